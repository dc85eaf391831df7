"""Grad-CAM: which regions of an image are evidence for a class (Selvaraju et al., arXiv:1610.02391).

The gradient of the class's logit with respect to the last spatial features, averaged over positions, gives
the weights of the channels; the positive part of the weighted sum is the map. For a network that ends in
global average pooling and one linear layer this is CAM (Zhou et al., arXiv:1512.04150).

Class tokens have no position in the image and are left out. If the classifier reads only a class token, the
patches of the last block have no gradient, and the features before that block are used. For a classifier on
several stages (:mod:`pretrained.stage_classifier`) the maps of the stages are added, in units of the logit.

Shape legend: B batch, C channels, H W pixels, h w positions of the map, L positions in all, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.errors import UsageError
from finetune.explain.positions import MapPosition, find_map_positions, has_single_cell
from pretrained.graph.pooling import Form
from pretrained.graph.recorder import FeatureRecorder, replace_value
from pretrained.graph.structures import map_tensors, tensors_in
from pretrained.stage_classifier import StageClassifier

NO_MAP = "the network has no spatial features"
ONE_CELL = "at {} pixels, its last features have a single cell: heat maps need larger images (--img-size)"
NO_EVIDENCE = "nothing in the image is evidence for this class: the map has no positive value"
_FAINT = 1e-6
"""A map has no positive value if the largest is at most this share of the largest magnitude."""

_Maps = list[tuple[Tensor, Form]]


@dataclass(frozen=True)
class HeatMap:
    """Where the evidence for a class is.

    Attributes:
        values: (h, w) float32 on the CPU, from 0 (none) to 1 (most); None if there is no map.
        reason: why there is none.
    """

    values: Tensor | None
    reason: str = ""


class GradCam:
    """Computes heat maps of one network.

    Args:
        network: a network (B, 3, H, W) -> (B, K) in eval mode, on any device; it is not modified.
        input_size: the shape (C, H, W) of its images.

    Attributes:
        reason: why maps are impossible for this network; empty if they are possible.
    """

    def __init__(self, network: nn.Module, input_size: tuple[int, int, int]) -> None:
        self._network, self._position, self.reason = network, None, ""
        if isinstance(network, StageClassifier):
            forms = [form for layer in network.extractor.layers for form in layer.forms]
            if not any(form.num_positions > 1 for form in forms):
                is_cell = any(form.size == (1, 1) for form in forms)
                self.reason = _one_cell(input_size) if is_cell else NO_MAP
            return
        try:
            self._position = self._find_position(input_size)
        except UsageError as error:  # from the trial forward pass
            self.reason = f"{NO_MAP} ({error.found})"
        else:
            self.reason = "" if self._position else _find_reason(network, input_size)

    def __call__(self, images: Tensor, *classes: Sequence[int]) -> list[list[HeatMap]]:
        """Return, for each list of classes, a map for each image.

        Args:
            images: (B, 3, H, W), normalised.
            classes: lists of B class indices in [0, K); all share one forward pass.
        """
        if self.reason:
            return [[HeatMap(None, self.reason)] * len(images) for _ in classes]
        with torch.inference_mode(False), torch.no_grad():
            maps, logits = self._forward(images)
            return [self._explain(maps, logits, wanted) for wanted in classes]

    def _explain(self, maps: _Maps, logits: Tensor, wanted: Sequence[int]) -> list[HeatMap]:
        index = torch.tensor(wanted, device=logits.device)[:, None]
        with torch.enable_grad():
            score = logits.gather(1, index).sum()
        leaves = [leaf for leaf, _ in maps]
        gradients = torch.autograd.grad(score, leaves, retain_graph=True)
        weighed = [
            _weigh(leaf, gradient, form) for (leaf, form), gradient in zip(maps, gradients, strict=True)
        ]
        return [_to_heat(evidence) for evidence in _add(weighed).cpu()]

    def _forward(self, images: Tensor) -> tuple[_Maps, Tensor]:
        """Return leaves of the autograd graph with their forms, and the logits (B, K) above them."""
        if isinstance(self._network, StageClassifier):
            return _forward_stages(self._network, images)
        assert self._position is not None
        return _forward_from(self._network, self._position, images)

    def _find_position(self, input_size: tuple[int, int, int]) -> MapPosition | None:
        """Return the deepest position in the network whose gradient depends on the position in the image."""
        weight = next(self._network.parameters())
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(1, *input_size, generator=generator).to(weight.device, weight.dtype)
        for position in find_map_positions(self._network, input_size):
            with torch.inference_mode(False), torch.no_grad():
                [(leaf, form)], logits = _forward_from(self._network, position, noise)
                mix = torch.randn(logits.shape[1], generator=generator).to(logits.device)
                with torch.enable_grad():
                    score = (logits * mix).sum()
                [gradient] = torch.autograd.grad(score, [leaf])
            if (
                _to_positions(gradient, form).any() or not gradient.any()
            ):  # or it is zero everywhere, also at class tokens
                return position
        return None


def _find_reason(network: nn.Module, input_size: tuple[int, int, int]) -> str:
    """Return why a network has no map: its images are too small, or it never has spatial features."""
    return _one_cell(input_size) if has_single_cell(network, input_size) else NO_MAP


def _one_cell(input_size: tuple[int, int, int]) -> str:
    return ONE_CELL.format(f"{input_size[1]} x {input_size[2]}")


# --- Leaves of the autograd graph inside a network ---


def _forward_from(network: nn.Module, position: MapPosition, images: Tensor) -> tuple[_Maps, Tensor]:
    """Run the network; autograd records it from the given position on."""
    with _leaf_at(network, position) as leaves:
        logits = tensors_in(network(images))[0].float()
    return [(leaf, position.form) for leaf in leaves], logits


@contextmanager
def _leaf_at(network: nn.Module, position: MapPosition) -> Iterator[list[Tensor]]:
    """Replace a tensor by a leaf of the autograd graph while the block runs.

    The network continues with a copy, because an in-place operation (a ReLU) would change the leaf.
    """
    leaves: list[Tensor] = []

    def exchange(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        torch.set_grad_enabled(True)  # the caller's no_grad() ends it
        leaves.append(_leaf_of(tensor))
        return leaves[-1].clone()

    try:
        with replace_value(network, position.point, lambda value: map_tensors(exchange, value)):
            yield leaves
    finally:
        torch.set_grad_enabled(False)


def _leaf_of(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def _forward_stages(staged: StageClassifier, images: Tensor) -> tuple[_Maps, Tensor]:
    """Run a classifier on several stages; autograd records the classifier only, not the network.

    The gradient of a stage is then its direct share in the logits, without that through later stages.
    """
    layers, pool = staged.extractor.layers, staged.extractor.pool
    recorder = FeatureRecorder(staged.network, [layer.point for layer in layers], [_leaves_of] * len(layers))
    leaves = recorder.record(images)
    with torch.enable_grad():
        rows = [layer.pooled(found, pool, len(images)) for layer, found in zip(layers, leaves, strict=True)]
        logits = staged.classifier(torch.cat(rows, dim=1))
    maps = [
        (leaf, form)
        for layer, found in zip(layers, leaves, strict=True)
        for leaf, form in zip(found, layer.forms, strict=True)
    ]
    return [(leaf, form) for leaf, form in maps if form.num_positions > 1], logits


def _leaves_of(value: Any) -> list[Tensor]:
    return [_leaf_of(tensor) for tensor in tensors_in(value) if tensor.is_floating_point()]


# --- From gradients to maps ---


def _to_positions(tensor: Tensor, form: Form) -> Tensor:
    """Return features in any order as (B, C, h, w), without class tokens."""
    assert form.size is not None
    if form.order == "channels_first":
        return tensor
    rows = tensor.reshape(len(tensor), -1, form.width)[:, form.prefix :]
    return rows.transpose(1, 2).reshape(len(tensor), form.width, *form.size)


def _weigh(leaf: Tensor, gradient: Tensor, form: Form) -> Tensor:
    """Return the map (B, h, w) in units of the logit; with global average pooling, its mean is its share."""
    features, slopes = _to_positions(leaf.detach(), form), _to_positions(gradient, form)
    weights = slopes.float().sum(dim=(2, 3), keepdim=True)
    return (weights * features.float()).sum(dim=1)


def _add(maps: Sequence[Tensor]) -> Tensor:
    """Return the sum of maps, at the resolution of the finest."""
    height, width = max((tuple(single.shape[1:]) for single in maps), key=lambda size: size[0] * size[1])
    if len(maps) == 1:
        return maps[0]
    return sum(
        (F.interpolate(single[:, None], (height, width), mode="bilinear")[:, 0] for single in maps),
        torch.zeros(1, device=maps[0].device),
    )


def _to_heat(evidence: Tensor) -> HeatMap:
    """Return the evidence for the class, relative to its maximum."""
    if not evidence.isfinite().all():
        return HeatMap(None, "the gradient is not finite")
    peak = evidence.max()
    if peak <= _FAINT * evidence.abs().max():
        return HeatMap(None, NO_EVIDENCE)
    return HeatMap((evidence / peak).clamp_min(0))
