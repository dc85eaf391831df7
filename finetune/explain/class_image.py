"""Class images: the image whose score for a class is as high as possible (Simonyan et al., arXiv:1312.6034).

Gradient ascent on the score of the class before the softmax, minus lambda times the squared norm of the
image, from the mean training image with a little noise. In the values of the network's input the mean is
zero, so the norm counts distances from the mean. After each step the image is projected onto the values that
an image file can hold.

The paper does not say what lambda is, and no number fits all networks: scores of one rise to 30, and of
another, without normalisation layers, to 2,500, where a small lambda leaves noise of full contrast. Where the
objective is highest, the image is the gradient of the score over twice lambda. So lambda follows from the
contrast that the image is to have, as the root mean square of that gradient over twice the contrast.

``is_smooth`` adds what makes such images less noisy: each step sees the image shifted by a few random pixels
(Mordvintsev et al., "Inceptionism", 2015), and the image is blurred now and then (Yosinski et al.,
arXiv:1506.06579). The images are then those that the network scores highly wherever they lie.

Shape legend: S images, each with a seed of its own, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as images_of

from finetune.explain.class_score import ComputeScores

NUM_STEPS = 200
CONTRAST = 0.5
"""Root mean square of the image's difference from the mean, in standard deviations of the network's input."""
_FIRST_STEP = 0.2
"""Share of the way to the gradient of that contrast that the first step goes; later ones are smaller."""
_TINY = 1e-30
"""Smallest size of a gradient, so that one of zero leaves the image as it is."""
_NOISE = 0.1
"""Standard deviation of the noise that an image begins with, without which ReLUs may all be at zero."""
_SHIFT = 1 / 28
"""Largest shift of ``is_smooth``, as a share of the side: 8 pixels of 224."""
_BLUR_EVERY, _BLUR = 5, 0.6
"""Steps from one blur to the next, and its standard deviation in pixels."""


@dataclass(frozen=True)
class ClassImages:
    """Images with a high score for one class.

    Attributes:
        pixels: (S, 3, H, W) float32 on the CPU, normalised as the network takes them.
        scores: (steps + 1, S) the score of the class before each step, and of the final images.
        decays: (S,) lambda at the last step.
    """

    pixels: Tensor
    scores: Tensor
    decays: Tensor


def compute_class_images(
    compute_scores: ComputeScores,
    index: int,
    start: Tensor,
    bounds: tuple[Tensor, Tensor],
    seeds: Sequence[int],
    *,
    is_smooth: bool = False,
    num_steps: int = NUM_STEPS,
    contrast: float = CONTRAST,
    advance: Callable[[], None] = lambda: None,
) -> ClassImages:
    """Return an image of high score for each seed.

    Args:
        compute_scores: scores (S, K) of images (:func:`finetune.explain.class_score.find_scores`).
        index: the class.
        start: (3, H, W) the mean training image, on the device of the network.
        bounds: black and white in the values of the network's input, each (3, 1, 1).
        seeds: seeds of the noise that each image begins with, and of its shifts; at least one.
        is_smooth: shift and blur the images.
        num_steps: steps of gradient ascent.
        contrast: root mean square of the images, from which lambda follows.
        advance: called after each step.
    """
    randoms = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = [torch.randn(start.shape, generator=random) for random in randoms]
    images = start + _NOISE * torch.stack(noise).to(start)
    low, high = (limit.to(start.device) for limit in bounds)
    history, decays = [], torch.zeros(len(seeds))
    with torch.inference_mode(False):
        for step in range(num_steps):
            shifts = [_draw_shift(random, start) if is_smooth else (0, 0) for random in randoms]
            scores, gradient = _differentiate(compute_scores, index, _shift(images, shifts))
            history.append(scores)
            gradient = _shift(gradient, [(-down, -right) for down, right in shifts])
            size = gradient.square().mean(dim=(1, 2, 3)).sqrt().clamp_min(_TINY)
            decays = size.cpu() / (2 * contrast)
            wanted = gradient * (contrast / size)[:, None, None, None]  # the gradient over twice lambda
            share = _FIRST_STEP * (1 - step / num_steps)
            images = torch.clamp(images + share * (wanted - images), low, high)
            if is_smooth and (step + 1) % _BLUR_EVERY == 0:
                images = images_of.gaussian_blur(images, [5, 5], [_BLUR, _BLUR])
            advance()
        with torch.no_grad():
            history.append(compute_scores(images)[:, index].cpu())
    return ClassImages(images.float().cpu(), torch.stack(history), decays)


def _draw_shift(random: torch.Generator, start: Tensor) -> tuple[int, int]:
    most = max(1, round(_SHIFT * start.shape[-1]))
    down, right = torch.randint(-most, most + 1, (2,), generator=random).tolist()
    return down, right


def _shift(images: Tensor, shifts: Sequence[tuple[int, int]]) -> Tensor:
    """Return each image moved down and to the right, around the edges."""
    pairs = zip(images, shifts, strict=True)
    return torch.stack([image.roll(shift, dims=(1, 2)) for image, shift in pairs])


def _differentiate(compute_scores: ComputeScores, index: int, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores (S,) on the CPU, and the gradient of each by its image."""
    leaf = images.detach().requires_grad_()
    with torch.enable_grad():
        scores = compute_scores(leaf)[:, index]
    [gradient] = torch.autograd.grad(scores.sum(), leaf)
    return scores.detach().cpu(), gradient
