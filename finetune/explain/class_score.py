"""The score of each class before the softmax, and before a ReLU after the classifier.

Some networks apply a ReLU to the scores (SqueezeNet). Where a score is negative, the output of such a network
is zero and has no gradient, so nothing can be improved; the score before the ReLU has one.

Shape legend: B batch, H W pixels, h w positions, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pretrained.graph.classifier import classifier_layers
from pretrained.graph.recorder import FeaturePoint, FeatureRecorder
from pretrained.graph.structures import tensors_in

ComputeScores = Callable[[Tensor], Tensor]
"""Returns the scores (B, K) of images (B, 3, H, W), which are differentiable."""
_TOLERANCE = 1e-4
"""Largest difference, relative to the largest score, of two ways to compute the same output."""


def find_scores(network: nn.Module, input_size: tuple[int, int, int]) -> ComputeScores:
    """Return the function that computes the scores of a network's classes.

    Args:
        network: (B, 3, H, W) -> logits (B, K), in eval mode; it is not modified.
        input_size: (C, H, W) of its images.
    """
    point = _find_point(network)
    if point is None or not _ends_in_relu(network, point, input_size):
        return lambda images: tensors_in(network(images))[0].float()
    recorder = FeatureRecorder(network, [point])
    return lambda images: _average(recorder.record(images)[0])


def _find_point(network: nn.Module) -> FeaturePoint | None:
    """Return the output of the classifier; None for a network with several or without one."""
    layers = classifier_layers(network)
    if len(layers) != 1:
        return None
    name = next(name for name, module in network.named_modules() if module is layers[0])
    return FeaturePoint(name, 0, at_input=False)


@torch.no_grad()
def _ends_in_relu(network: nn.Module, point: FeaturePoint, input_size: tuple[int, int, int]) -> bool:
    """Return whether the logits are the positive part of the classifier's output, averaged over positions."""
    weight = next(network.parameters())
    noise = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
    [raw], output = FeatureRecorder(network, [point]).record_all(noise.to(weight.device, weight.dtype))
    scores, raw = tensors_in(output)[0], tensors_in(raw)[0]
    if raw.min() >= 0 or scores.min() < 0 or raw.ndim not in (2, 4):
        return False
    positive = _average(raw.relu())
    most = _TOLERANCE * raw.abs().max().item()
    return positive.shape == scores.shape and torch.allclose(positive, scores, rtol=0, atol=most)


def _average(raw: Tensor) -> Tensor:
    """Return the mean over positions: (B, K, h, w) -> (B, K); a matrix stays as it is."""
    return raw.float().flatten(2).mean(dim=2) if raw.ndim > 2 else raw.float()
