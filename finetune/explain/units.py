"""Units of feature maps: one channel at one position of a layer, for any order of its axes.

Shape legend: B batch, C channels, h w positions of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from finetune.explain.positions import MapPosition
from pretrained.graph.pooling import Form, to_map
from pretrained.graph.recorder import FeatureRecorder
from pretrained.graph.structures import tensors_in


class Unit(NamedTuple):
    """One unit of a layer.

    Attributes:
        channel: the feature map, from 0; None for all of them.
        row: from 0, at the top.
        column: from 0, at the left.
    """

    channel: int | None
    row: int
    column: int


class Box(NamedTuple):
    """A box of pixels; ``bottom`` and ``right`` are the first row and column after it."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.bottom - self.top, self.right - self.left


def record_maps(network: nn.Module, positions: Sequence[MapPosition], images: Tensor) -> list[Tensor]:
    """Return the feature maps (B, C, h, w) of some layers, with autograd's history where it is on.

    Args:
        network: a network in eval mode; it does not change.
        positions: the layers, at least one.
        images: (B, 3, H, W), normalised.
    """
    points = [position.point for position in positions]
    transforms = [partial(read_map, form=position.form) for position in positions]
    return FeatureRecorder(network, points, transforms).record(images)


def read_map(value: Any, form: Form) -> Tensor:
    """Return a copy of the feature map (B, C, h, w) in the value of a layer, which has one map."""
    tensor = next(tensor for tensor in tensors_in(value) if tensor.is_floating_point())
    return to_map(tensor.clone(), form)  # an operation in place may overwrite the value


def activations_of(maps: Tensor, units: Sequence[Unit]) -> Tensor:
    """Return the activation (B,) of one unit for each image.

    Args:
        maps: (B, C, h, w).
        units: B of them, each with a channel.
    """
    channels, rows, columns = torch.tensor([tuple(unit) for unit in units], device=maps.device).T
    return maps[torch.arange(len(units), device=maps.device), channels, rows, columns]
