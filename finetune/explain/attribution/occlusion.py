"""Occlusion: how far the logit falls when a grey square covers a place (Zeiler and Fergus, arXiv:1311.2901).

The square moves over the image in steps of half its side. A pixel's value is the mean fall over all squares
that cover it. The network is only run forward, so that the method needs no gradient.

Shape legend: B batch, H W pixels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from finetune.explain.attribution.gradient import compute_scores

SHARE = 7
"""Sides of the square in one side of the image."""


def compute_occlusion(network: nn.Module, images: Tensor, classes: Tensor, share: int = SHARE) -> Tensor:
    """Return the mean fall of the logit where a place is covered: (B, H, W) float32.

    Positive values are evidence for the class, negative ones evidence against it.

    Args:
        network: (B, 3, H, W) -> (B, K), in eval mode, on the device of the images; it is not modified.
        images: (B, 3, H, W) float32, normalised; zero, the mean colour of the training images, is the grey.
        classes: (B,) int64, class indices in [0, K).
        share: how many squares side by side cover the image. It is run about ``(2 share)**2`` times.
    """
    with torch.inference_mode():
        whole = compute_scores(network, images, classes)
        total, times = torch.zeros_like(images[:, 0]), torch.zeros_like(images[0, 0])
        for rows, columns in _windows(images.shape[2], images.shape[3], share):
            covered = images.clone()
            covered[:, :, rows, columns] = 0
            total[:, rows, columns] += (whole - compute_scores(network, covered, classes))[:, None, None]
            times[rows, columns] += 1
        return total / times


def _windows(height: int, width: int, share: int) -> Iterator[tuple[slice, slice]]:
    """Yield rows and columns of every square, the last ones cut off at the edge."""
    side_y, side_x = math.ceil(height / share), math.ceil(width / share)
    for top in range(0, height, math.ceil(side_y / 2)):
        for left in range(0, width, math.ceil(side_x / 2)):
            yield slice(top, top + side_y), slice(left, left + side_x)
