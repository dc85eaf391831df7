"""Integrated gradients: each pixel's share in the logit (Sundararajan et al., arXiv:1703.01365).

The gradient is averaged on the straight way from a grey image to the image, and multiplied by the difference
of the two. The shares then add up to the difference of the two logits. A pixel of exactly that grey has no
share: that is a limit of the method.

Shape legend: B batch, H W pixels, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from finetune.explain.attribution.gradient import compute_gradient

STEPS = 32
"""Points on the way from grey to the image, in the middle of as many equal steps."""


def compute_integrated(network: nn.Module, images: Tensor, classes: Tensor, steps: int = STEPS) -> Tensor:
    """Return the share of each pixel in the logit, summed over the channels: (B, H, W) float32.

    Positive values are evidence for the class, negative ones evidence against it.

    Args:
        network: (B, 3, H, W) -> (B, K), in eval mode, on the device of the images; it is not modified.
        images: (B, 3, H, W) float32, normalised; zero is the mean colour of the training images.
        classes: (B,) int64, class indices in [0, K).
        steps: number of gradients, at least 1. With more, the sum comes closer to the difference.
    """
    total = torch.zeros_like(images)
    for step in range(steps):
        total += compute_gradient(network, images * ((step + 0.5) / steps), classes)
    return (images * total / steps).sum(dim=1)
