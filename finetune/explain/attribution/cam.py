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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.errors import UsageError
from finetune.explain.attribution.heat_map import HeatMap, to_heat_map
from finetune.explain.leaves import forward_from, leaf_of
from finetune.explain.positions import MapPosition, find_map_positions, has_single_cell
from pretrained.graph.pooling import Form, to_map
from pretrained.graph.recorder import FeatureRecorder
from pretrained.graph.structures import tensors_in
from pretrained.stage_classifier import StageClassifier

NO_MAP = "the network has no spatial features"
ONE_CELL = "at {} pixels, its last features have a single cell: heat maps need larger images (--img-size)"
UNUSED = "the class score does not depend on the map at {}: a class token is all that is read of it"

_Maps = list[tuple[Tensor, Form]]


class GradCam:
    """Computes Grad-CAM maps of one network.

    Args:
        network: a network (B, 3, H, W) -> (B, K) in eval mode, on any device; it is not modified.
        input_size: the shape (C, H, W) of its images.
        position: where the features are taken; by default at the deepest position whose gradient depends on
            the place in the image. A classifier on several stages takes them at these stages by default.

    Attributes:
        position: where the features are taken; None at several stages, or if maps are impossible.
        reason: why maps are impossible for this network; empty if they are possible.
    """

    def __init__(
        self, network: nn.Module, input_size: tuple[int, int, int], position: MapPosition | None = None
    ) -> None:
        self._network, self.position, self.reason = network, position, ""
        if position is not None:
            if not _is_used(network, position, input_size):
                self.reason = UNUSED.format(position.point)
            return
        if isinstance(network, StageClassifier):
            forms = [form for layer in network.extractor.layers for form in layer.forms]
            if not any(form.num_positions > 1 for form in forms):
                is_cell = any(form.size == (1, 1) for form in forms)
                self.reason = _one_cell(input_size) if is_cell else NO_MAP
            return
        try:
            self.position = self._find_position(input_size)
        except UsageError as error:  # from the trial forward pass
            self.reason = f"{NO_MAP} ({error.found})"
        else:
            self.reason = "" if self.position else _find_reason(network, input_size)

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
            self._weigh(to_map(leaf.detach(), form).float(), to_map(gradient, form).float())
            for (leaf, form), gradient in zip(maps, gradients, strict=True)
        ]
        return [to_heat_map(evidence) for evidence in _add(weighed).cpu()]

    def _weigh(self, features: Tensor, slopes: Tensor) -> Tensor:
        """Return the map (B, h, w) in units of the logit; with global average pooling, its mean is its share.

        Args:
            features: (B, C, h, w) float32.
            slopes: the gradient of the logit by the features.
        """
        return (slopes.sum(dim=(2, 3), keepdim=True) * features).sum(dim=1)

    def _forward(self, images: Tensor) -> tuple[_Maps, Tensor]:
        """Return leaves of the autograd graph with their forms, and the logits (B, K) above them."""
        if self.position is not None:
            return forward_from(self._network, self.position, images)
        assert isinstance(self._network, StageClassifier)
        return _forward_stages(self._network, images)

    def _find_position(self, input_size: tuple[int, int, int]) -> MapPosition | None:
        """Return the deepest position in the network whose gradient depends on the place in the image."""
        positions = find_map_positions(self._network, input_size)
        return next((one for one in positions if _is_used(self._network, one, input_size)), None)


def _is_used(network: nn.Module, position: MapPosition, input_size: tuple[int, int, int]) -> bool:
    """Return whether the logits depend on the positions of a map, and not on class tokens beside it alone.

    A gradient that is zero everywhere, also at class tokens, tells nothing, and counts as used.
    """
    weight = next(network.parameters())
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, *input_size, generator=generator).to(weight.device, weight.dtype)
    with torch.inference_mode(False), torch.no_grad():
        [(leaf, form)], logits = forward_from(network, position, noise)
        mix = torch.randn(logits.shape[1], generator=generator).to(logits.device)
        with torch.enable_grad():
            score = (logits * mix).sum()
        [gradient] = torch.autograd.grad(score, [leaf])
    return bool(to_map(gradient, form).any() or not gradient.any())


def _find_reason(network: nn.Module, input_size: tuple[int, int, int]) -> str:
    """Return why a network has no map: its images are too small, or it never has spatial features."""
    return _one_cell(input_size) if has_single_cell(network, input_size) else NO_MAP


def _one_cell(input_size: tuple[int, int, int]) -> str:
    return ONE_CELL.format(f"{input_size[1]} x {input_size[2]}")


# --- Forward passes ---


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
    return [leaf_of(tensor) for tensor in tensors_in(value) if tensor.is_floating_point()]


# --- From gradients to maps ---


def _add(maps: Sequence[Tensor]) -> Tensor:
    """Return the sum of maps, at the resolution of the finest."""
    height, width = max((tuple(single.shape[1:]) for single in maps), key=lambda size: size[0] * size[1])
    if len(maps) == 1:
        return maps[0]
    return sum(
        (F.interpolate(single[:, None], (height, width), mode="bilinear")[:, 0] for single in maps),
        torch.zeros(1, device=maps[0].device),
    )
