"""Several views of one image (test-time augmentation), which also cover what the evaluation crop leaves out.

::

    image -> resized to short side S, for each scale S -> crops of the network's input size -> (V, 3, H, W)

Five crops are the four corners and the centre; ten are these and their mirrors (AlexNet's; NIPS 2012). Scales
are those of arXiv:1409.1556, section 3.2. Probabilities are averaged over views, as both did.

Shape legend: B images, V views of each, K classes, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import functional

from finetune.data.transforms import build_eval_transform
from finetune.errors import UsageError
from finetune.targets import to_probabilities
from pretrained.catalog import Preprocessing

CROPS = (1, 5, 10)
"""Crops per scale: the centre; corners and centre; both with their mirror images."""
LARGEST_SCALE = 4096
"""Largest short side in pixels: the largest input size of a recipe."""
_ROOM = 0.875
"""Input size / short side if the evaluation view leaves no room for corners (AlexNet: 224 / 256)."""
_Step = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True)
class Views:
    """A transform from an image to its views.

    Attributes:
        scales: short side in pixels that the image is resized to, in order; ``()`` for the plain view.
        crops: of each scale.
    """

    scales: tuple[int, ...]
    crops: int
    _draw: Callable[[Image.Image], Iterator[Tensor]]

    @property
    def num_views(self) -> int:
        """Views of an image (V)."""
        return max(1, len(self.scales)) * self.crops

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the views of an RGB image, uint8 (V, 3, H, W), contiguous.

        Scale by scale; of each: top left, top right, bottom left, bottom right, centre, then the mirrors in
        the same order.
        """
        return torch.stack(list(self._draw(image)))


def build_views(preprocessing: Preprocessing, crops: int = 1, scales: Sequence[int] = ()) -> Views:
    """Build the transform from an image to its views.

    One crop at the default scale is the evaluation view, to the last bit. The default scale is that of the
    evaluation view; where that resizes to the input size itself (``crop_pct`` 1), all crops would be one, and
    the default of several is the input size by 0.875, rounded up.

    ``squash`` resizes both sides to S. ``border`` resizes the longer side to S, and fills up a side that is
    shorter than the input.

    Args:
        preprocessing: of the network.
        crops: 1, 5 or 10.
        scales: short side S in pixels of each scale; none for the default.

    Raises:
        UsageError: another number of crops, or a scale under the input size or over ``LARGEST_SCALE``.
    """
    _check(preprocessing.img_size, crops, scales)
    if crops == 1 and not scales:
        plain = build_eval_transform(preprocessing)
        return Views((), 1, lambda image: iter([plain(image)]))
    chosen = tuple(scales) or (resolve_scale(preprocessing),)
    resizes = [_build_resize(preprocessing, scale) for scale in chosen]
    crop, to_tensor = create_transform(
        **preprocessing.to_timm(), is_training=False, normalize=False
    ).transforms[1:]

    def draw(image: Image.Image) -> Iterator[Tensor]:
        for resize in resizes:
            resized = resize(image)
            views = [crop(resized)]
            if crops > 1:
                views = [*_corners(_fill_up(resized, preprocessing), preprocessing.img_size), *views]
            if crops == 10:
                views += [functional.hflip(view) for view in views]
            yield from (to_tensor(view) for view in views)

    return Views(chosen, crops, draw)


def resolve_scale(preprocessing: Preprocessing) -> int:
    """Return the default scale of several crops, in pixels."""
    own = math.floor(preprocessing.img_size / preprocessing.crop_pct)
    return own if own > preprocessing.img_size else math.ceil(preprocessing.img_size / _ROOM)


def compute_mean_over_views(logits: Tensor, num_views: int, temperature: float = 1.0) -> Tensor:
    """Return probabilities (B, K) float32 of logits over temperature, averaged over views.

    Args:
        logits: (B * V, K), views of one image side by side.
        num_views: V.
        temperature: of the classifier (arXiv:1706.04599).
    """
    probabilities = to_probabilities(logits.float() / temperature)
    return probabilities.view(-1, num_views, logits.shape[1]).mean(dim=1)


def _check(img_size: int, crops: int, scales: Sequence[int]) -> None:
    if crops not in CROPS:
        raise UsageError(f"--crops {crops}", "that number of crops is not supported", "Choose 1, 5 or 10.")
    if small := [scale for scale in scales if scale < img_size]:
        found = f"the input size of the network is {img_size} pixels, more than an image of that scale has"
        raise UsageError(f"--scales {small[0]}", found, f"Take scales of {img_size} pixels or more.")
    if large := [scale for scale in scales if scale > LARGEST_SCALE]:
        found = f"each image would be resized to {large[0]} x {large[0]} pixels or more"
        raise UsageError(f"--scales {large[0]}", found, f"Take scales up to {LARGEST_SCALE} pixels.")


def _build_resize(preprocessing: Preprocessing, scale: int) -> _Step:
    """Return timm's resize step for a network whose input is the whole resized image."""
    whole = replace(preprocessing, img_size=scale, crop_pct=1.0)
    resize: _Step = _steps(whole)[0]
    return resize


def _steps(preprocessing: Preprocessing) -> list[Any]:
    """Return timm's three steps: resize, centre crop, conversion to a uint8 tensor."""
    view = create_transform(**preprocessing.to_timm(), is_training=False, normalize=False)
    return list(view.transforms)


def _fill_up(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Pad an image with a side under the input size with the mean colour; only ``border`` needs it."""
    width, height = (max(side, preprocessing.img_size) for side in image.size)
    if (width, height) == image.size:
        return image
    left, top = (width - image.width) // 2, (height - image.height) // 2
    filled = Image.new("RGB", (width, height), tuple(round(255 * mean) for mean in preprocessing.mean))
    filled.paste(image, (left, top))
    return filled


def _corners(image: Image.Image, size: int) -> Iterator[Image.Image]:
    for top in (0, image.height - size):
        for left in (0, image.width - size):
            yield image.crop((left, top, left + size, top + size))
