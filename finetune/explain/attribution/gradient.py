"""Saliency: the gradient of a class's logit by the pixels (Simonyan et al., arXiv:1312.6034).

The map is the maximum over the colour channels of the absolute gradient. The logit is taken before the
softmax, whose gradient could be lowered by other classes instead.

Shape legend: B batch, H W pixels, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrained.graph.structures import tensors_in


def compute_saliency(network: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Return the saliency maps (B, H, W) float32, in logits per unit of the normalised pixels.

    Args:
        network: (B, 3, H, W) -> (B, K), in eval mode, on the device of the images; it is not modified.
        images: (B, 3, H, W) float32, normalised.
        classes: (B,) int64, class indices in [0, K).
    """
    return compute_gradient(network, images, classes).abs().amax(dim=1)


def compute_gradient(network: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Return the gradient of each image's logit by its pixels, (B, 3, H, W).

    Gradients of the parameters are neither computed nor changed. The arguments are those of
    :func:`compute_saliency`.
    """
    with torch.inference_mode(False), torch.enable_grad():
        pixels = images.clone().requires_grad_()
        scores = compute_scores(network, pixels.clone(), classes)  # a first layer may work in place
        [gradient] = torch.autograd.grad(scores.sum(), [pixels])
    return gradient


def compute_scores(network: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Return the logit (B,) float32 of a class for each image; the arguments are as above."""
    logits = tensors_in(network(images))[0].float()
    return logits.gather(1, classes.to(logits.device)[:, None])[:, 0]
