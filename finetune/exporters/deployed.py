"""The network as one exported graph: from uint8 or normalised images to logits or probabilities.

Shape legend: B batch, H W pixels, K classes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from finetune.data.transforms import Normalizer
from finetune.errors import UsageError
from finetune.targets import read_target
from pretrained.catalog import Card
from pretrained.graph.layers import FeatureExtractor
from pretrained.preprocessing import Preprocessing
from pretrained.stage_classifier import StageClassifier

Layout = Literal["nchw", "nhwc"]
LAYOUTS: tuple[Layout, ...] = ("nchw", "nhwc")
_TRACED = 2
"""Batch size of the example input; with 1, the exporter would fix the batch size."""
_HINT = 'For more information, run with TORCH_LOGS="+dynamic".'


@dataclass(frozen=True)
class Interface:
    """Input and output of an exported graph.

    Attributes:
        layout: layout of uint8 images, which the graph normalises; None for float32 (B, C, H, W) images that
            are already normalised, and for arrays.
        is_calibrated: output probabilities, calibrated by the card's temperature, instead of logits.
    """

    layout: Layout | None = None
    is_calibrated: bool = False

    @property
    def input_name(self) -> str:
        """Name of the input."""
        return "images"

    @property
    def output_name(self) -> str:
        """Name of the output."""
        return "probabilities" if self.is_calibrated else "logits"

    @property
    def input_dtype(self) -> str:
        """Data type of the input: ``uint8`` or ``float32``."""
        return "uint8" if self.layout else "float32"

    def input_shape(self, view: Preprocessing) -> tuple[int, int, int]:
        """Return the input shape without the batch dimension."""
        planes, height, width = view.input_size
        return (height, width, planes) if self.layout == "nhwc" else (planes, height, width)

    def arrange(self, views: Tensor, view: Preprocessing) -> Tensor:
        """Convert views (B, C, H, W) to the graph's input."""
        if self.layout is None:
            return Normalizer(view, views.device)(views)
        return views.permute(0, 2, 3, 1).contiguous() if self.layout == "nhwc" else views


class Deployed(nn.Module):
    """A network with optional normalisation before it and calibrated probabilities after it.

    Args:
        network: network (B, C, H, W) -> (B, K) in eval mode.
        card: description of the network, with its preprocessing and temperature.
        interface: input and output of the graph.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, card: Card, interface: Interface) -> None:
        super().__init__()
        is_staged = isinstance(network, StageClassifier)
        self.network = _WholeStageClassifier(network) if is_staged else network
        self.interface, self.temperature = interface, card.temperature
        self.target = read_target(dict(card.target))
        view = card.preprocessing
        self.register_buffer("mean", torch.tensor(view.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(view.std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits or probabilities (B, K)."""
        if self.interface.layout == "nhwc":
            images = images.permute(0, 3, 1, 2)
        if self.interface.layout is not None:  # same operations and order as Normalizer
            images = ((images.float() / 255.0) - self.mean) / self.std
        logits: Tensor = self.network(images)
        return self.target.activate(logits / self.temperature) if self.interface.is_calibrated else logits


class _WholeStageClassifier(nn.Module):
    """A :class:`StageClassifier` whose forward runs to the end instead of leaving by an exception.

    Tracing needs a forward that returns. The operations after the last feature are unused, and are dropped
    from the graph.
    """

    def __init__(self, staged: nn.Module) -> None:
        super().__init__()
        assert isinstance(staged, StageClassifier)
        self.network, self.classifier = staged.network, staged.classifier
        extractor = staged.extractor
        self._extract = FeatureExtractor(staged.network, extractor.layers, extractor.pool, with_logits=True)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.cat(self._extract(images)[:-1], dim=1))
        return logits


def build_program(network: nn.Module, card: Card, interface: Interface) -> ExportedProgram:
    """Trace a network with a dynamic batch size.

    Args:
        network: network on the CPU, in eval mode.
        card: description of the network.
        interface: input and output of the graph.

    Raises:
        UsageError: the network cannot be traced, or works for a single batch size only.
    """
    deployed = Deployed(network, card, interface).eval()
    shape = (_TRACED, *interface.input_shape(card.preprocessing))
    example = torch.zeros(shape, dtype=torch.uint8 if interface.layout else torch.float32)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                deployed, (example,), dynamic_shapes={interface.input_name: {0: Dim("batch")}}
            )
    except Exception as error:  # of any class: the network's own code is traced
        raise cannot_export(card, "torch.export cannot trace it for any number of images", error) from None
    return _without_dead_end(program) if isinstance(network, StageClassifier) else program


def _without_dead_end(program: ExportedProgram) -> ExportedProgram:
    """Remove unused operations; torch keeps those with metadata assertions or in-place writes by itself."""
    program = program.run_decompositions({})
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def cannot_export(card: Card, what: str, error: Exception) -> UsageError:
    """Return the error for a network that a format cannot represent."""
    reason = " ".join(str(error).replace(_HINT, "").split())[:300] or "no reason was given"
    found = f"{what} ({type(error).__name__}: {reason})"
    return UsageError(
        f"exporting {card.architecture}", found, "Use --format timm, which supports every network."
    )
