"""A part of each image that a network sees: the border, or all but the middle.

What is hidden has the mean that the network subtracts, so that it is neither dark nor bright.

Shape legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

Region = Literal["whole", "border", "surroundings", "middle"]
"""``border``: a frame whose width is a sixteenth of the side, 23 % of the area. ``surroundings``: all but a
rectangle in the middle. ``middle``: that rectangle; it has half of the area."""
_FRAME = 1 / 16
_REST = (1 - 0.5**0.5) / 2
"""Width of the surroundings as a share of the side."""


def build_mask(region: Region, size: tuple[int, int]) -> Tensor:
    """Return which pixels belong to a region, (H, W) bool.

    Args:
        region: the region.
        size: H and W. A frame has at least one pixel on each side.
    """
    if region == "whole":
        return torch.ones(size, dtype=torch.bool)
    mask = torch.ones(size, dtype=torch.bool)
    share = _FRAME if region == "border" else _REST
    down, right = (max(1, round(share * side)) for side in size)
    mask[down : size[0] - down, right : size[1] - right] = False
    return ~mask if region == "middle" else mask


def hide_outside(
    region: Region, input_size: tuple[int, int, int], device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Return a function that hides what is outside of a region in normalised images (B, C, H, W).

    Args:
        region: what stays visible.
        input_size: (C, H, W) of the images.
        device: of the images.
    """
    if region == "whole":
        return lambda images: images
    mask = build_mask(region, input_size[1:]).to(device, torch.float32)
    return lambda images: images * mask


def describe_region(region: Region) -> dict[str, Any]:
    """Return what cached features depend on; nothing for whole images, which were cached before."""
    return {} if region == "whole" else {"region": [region, _FRAME, _REST]}
