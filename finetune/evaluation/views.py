"""Several views of an image (test-time augmentation), which also cover what the evaluation crop cuts off.

::

    image -> resized to scale S, for each S -> crops of the network's input size -> (V, 3, H, W)

Five crops are the four corners and the centre; ten are these and their mirror images (AlexNet, NIPS 2012).
Several scales are used as in arXiv:1409.1556, section 3.2. As in both papers, probabilities are averaged over
views.

Shape legend: B images, V views of each, K classes, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional

from finetune.data.transforms import Opened, build_eval_steps, build_eval_transform
from finetune.errors import UsageError
from finetune.targets import SINGLE, Target
from pretrained.preprocessing import Preprocessing

CROPS = (1, 5, 10)
"""Crops per scale: the centre; corners and centre; both with their mirror images."""
LARGEST_SCALE = 4096
"""Largest short side in pixels: the largest input size of a recipe."""
_ROOM = 0.875
"""Input size / short side if the evaluation transform crops nothing (AlexNet: 224 / 256)."""
_Step = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True)
class Views:
    """A transform from an image to its views.

    Attributes:
        scales: scales in pixels, in order; ``()`` for the plain view.
        crops: number of crops of each scale.
    """

    scales: tuple[int, ...]
    crops: int
    _draw: Callable[[Any], Iterator[Tensor]]

    @property
    def num_views(self) -> int:
        """Number of views of an image (V)."""
        return max(1, len(self.scales)) * self.crops

    def __call__(self, image: Opened) -> Tensor:
        """Return the views of an RGB image, uint8 (V, 3, H, W), contiguous; of an array float32 (1, C, H, W).

        The order is scale by scale, and within a scale: top left, top right, bottom left, bottom right,
        centre, then their mirror images in the same order.
        """
        return torch.stack(list(self._draw(image)))


def build_views(preprocessing: Preprocessing, crops: int = 1, scales: Sequence[int] = ()) -> Views:
    """Build the transform from an image to its views.

    One crop at the default scale equals the evaluation transform, bit for bit. The default scale is that of
    the evaluation transform. If that resizes to the input size itself (``crop_pct`` 1), all crops would be
    equal; the default scale for several crops is then the input size / 0.875, rounded up.

    Scale S resizes an image to a short side of S pixels. If it is squashed, both sides get S pixels; if it is
    padded, the longer side does, and a side shorter than the input's is padded. If the input is no square, S
    stands for a rectangle of its aspect ratio with the shorter side S.

    Args:
        preprocessing: preprocessing of the network.
        crops: number of crops: 1, 5 or 10.
        scales: S in pixels of each scale; empty for the default.

    Raises:
        UsageError: the number of crops is another one, a scale is below the input size or above
            ``LARGEST_SCALE``, or the network takes arrays.
    """
    _check(min(preprocessing.size), crops, scales)
    if not preprocessing.is_rgb and (crops > 1 or scales):
        found = "the network takes no photographs, and its images have one view"
        raise UsageError(f"--crops {crops}" if crops > 1 else f"--scales {scales[0]}", found, "Leave it out.")
    if crops == 1 and not scales:
        plain = build_eval_transform(preprocessing)
        return Views((), 1, lambda image: iter([plain(image)]))
    chosen = tuple(scales) or (resolve_scale(preprocessing),)
    resizes = [_build_resize(preprocessing, scale) for scale in chosen]
    _, crop, to_tensor = build_eval_steps(preprocessing)

    def draw(image: Image.Image) -> Iterator[Tensor]:
        for resize in resizes:
            resized = resize(image)
            views = [crop(resized)]
            if crops > 1:
                views = [*_corners(_pad(resized, preprocessing), *preprocessing.size), *views]
            if crops == 10:
                views += [functional.hflip(view) for view in views]
            yield from (to_tensor(view) for view in views)

    return Views(chosen, crops, draw)


def resolve_scale(preprocessing: Preprocessing) -> int:
    """Return the default scale for several crops, in pixels."""
    short_side = min(preprocessing.size)
    scale = math.floor(short_side / preprocessing.crop_pct)
    return scale if scale > short_side else math.ceil(short_side / _ROOM)


def compute_mean_over_views(
    logits: Tensor, num_views: int, temperature: float = 1.0, target: Target = SINGLE
) -> Tensor:
    """Return the probabilities (B, K) float32 of logits / temperature, averaged over views; or the values.

    Args:
        logits: logits (B * V, K); the views of an image follow each other.
        num_views: number of views (V).
        temperature: temperature of the network (arXiv:1706.04599).
        target: what the labels are.
    """
    probabilities = target.activate(logits.float() / temperature)
    return probabilities.view(-1, num_views, logits.shape[1]).mean(dim=1)


def _check(short_side: int, crops: int, scales: Sequence[int]) -> None:
    if crops not in CROPS:
        raise UsageError(f"--crops {crops}", "that number of crops is not supported", "Choose 1, 5 or 10.")
    if small := [scale for scale in scales if scale < short_side]:
        found = f"the input size of the network is {short_side} pixels, more than an image of that scale has"
        raise UsageError(f"--scales {small[0]}", found, f"Take scales of {short_side} pixels or more.")
    if large := [scale for scale in scales if scale > LARGEST_SCALE]:
        found = f"each image would be resized to {large[0]} x {large[0]} pixels or more"
        raise UsageError(f"--scales {large[0]}", found, f"Take scales up to {LARGEST_SCALE} pixels.")


def _build_resize(preprocessing: Preprocessing, scale: int) -> _Step:
    """Return timm's resize step to a scale of the input size."""
    short_side = min(preprocessing.size)
    height, width = (math.ceil(side * scale / short_side) for side in preprocessing.size)
    resize: _Step = build_eval_steps(replace(preprocessing, img_size=(height, width), crop_pct=1.0))[0]
    return resize


def _pad(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Pad sides shorter than the input size with the mean colour; only padded images have such."""
    height, width = preprocessing.size
    width, height = max(image.width, width), max(image.height, height)
    if (width, height) == image.size:
        return image
    left, top = (width - image.width) // 2, (height - image.height) // 2
    padded = Image.new("RGB", (width, height), tuple(round(255 * mean) for mean in preprocessing.mean))
    padded.paste(image, (left, top))
    return padded


def _corners(image: Image.Image, height: int, width: int) -> Iterator[Image.Image]:
    for top in (0, image.height - height):
        for left in (0, image.width - width):
            yield image.crop((left, top, left + width, top + height))
