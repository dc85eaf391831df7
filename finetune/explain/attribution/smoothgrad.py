"""SmoothGrad: the mean gradient over noisy copies of an image (Smilkov et al., arXiv:1706.03825).

The gradient of a single image changes sharply from pixel to pixel; its mean in a neighbourhood does not.

Shape legend: B batch, H W pixels, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from finetune.explain.attribution.gradient import compute_gradient

SAMPLES = 25
"""Noisy copies of each image; the paper sees little change above 50."""
NOISE = 0.15
"""Standard deviation of the noise as a share of the image's range of values; the paper takes 0.1 to 0.2."""


def compute_smoothgrad(
    network: nn.Module, images: Tensor, classes: Tensor, samples: int = SAMPLES, noise: float = NOISE
) -> Tensor:
    """Return the maximum over the channels of the absolute mean gradient, (B, H, W) float32.

    All images get the same noise, from a generator of its own, so that a map depends neither on the other
    images of its batch nor on the global random state.

    Args:
        network: (B, 3, H, W) -> (B, K), in eval mode, on the device of the images; it is not modified.
        images: (B, 3, H, W) float32, normalised.
        classes: (B,) int64, class indices in [0, K).
        samples: number of noisy copies, at least 1.
        noise: standard deviation of the noise, as a share of the range of each image's values.
    """
    generator = torch.Generator().manual_seed(0)
    spread = noise * (images.amax(dim=(1, 2, 3)) - images.amin(dim=(1, 2, 3)))[:, None, None, None]
    total = torch.zeros_like(images)
    for _ in range(samples):
        drawn = torch.randn(images.shape[1:], generator=generator).to(images)
        total += compute_gradient(network, images + spread * drawn, classes)
    return (total / samples).abs().amax(dim=1)
