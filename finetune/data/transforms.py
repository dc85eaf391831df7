"""Image transforms: the evaluation view is timm's, the training views are torchvision's.

::

    file -> image -> view, uint8 (3, H, W) -> device -> float32, normalised
            Transform.open  Transform()                   Normalizer

Views are sent to the device as uint8, a quarter of the size of float32. Training views draw from torch's
generator, which the loader seeds for each image. (timm's RandAugment is not used: at its highest magnitude it
asks Pillow for zero bits of colour, which Pillow refuses.) Images of bands
(:mod:`finetune.data.channels.bands`) are standardised when they are opened; their views are float32
(C, H, W). Networks that take arrays have one view of a file, its array, which is not normalised.

Shape legend: B batch, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import CenterCropOrPad
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomErasing, RandomResizedCrop, v2

from finetune.data.channels.arrays import Planes, read_planes
from finetune.data.channels.bands import read_bands, standardise
from finetune.data.decode import decode_image
from finetune.recipe import Augmentation
from pretrained.preprocessing import Preprocessing

Opened = Image.Image | Planes
"""What a file holds: an RGB image, or numbers (C, H, W)."""
_SMALLEST_CROP = {"light": 0.5, "medium": 0.5, "heavy": 0.2}
"""Smallest share of the image's area in a random crop. ImageNet training uses 0.08, but in a small dataset
too many views would then miss the object."""
_NARROWEST = 3 / 4
"""Smallest aspect ratio of a random crop, in either orientation (torchvision's default)."""


@dataclass(frozen=True)
class Transform:
    """Makes a view from an image file.

    Attributes:
        draw: makes a view, uint8 (3, H, W), from a photograph; float32 (C, H, W) from numbers.
        preprocessing: input size and normalisation of the network.
        is_random: whether every call gives another view.
        short_side: number of pixels of the shorter side that suffices for a view (``decode_image``); None
            decodes every pixel, as timm does.
    """

    draw: Callable[[Any], Tensor]
    preprocessing: Preprocessing
    is_random: bool
    short_side: int | None = None

    def open(self, path: Path) -> Opened:
        """Return the image, or the numbers, that views are drawn from.

        Raises:
            BadImageError: as ``decode_image``, ``read_bands`` or ``read_planes``.
        """
        if self.preprocessing.kind == "array":
            return read_planes(path, self.preprocessing.input_size)
        if self.preprocessing.kind == "bands":
            return standardise(read_bands(path, self.preprocessing.channels), self.preprocessing)
        return decode_image(path, self.short_side, self.preprocessing.value_range)

    def __call__(self, image: Opened) -> Tensor:
        """Return a view, uint8 (3, H, W) or float32 (C, H, W), contiguous."""
        return self.draw(image).contiguous()


def draw_view(view: Tensor) -> Image.Image:
    """Return what the network sees of an image, as an RGB image.

    Of bands it is the mean of the channels in grey: black and white are two deviations from the mean.

    Args:
        view: uint8 (3, H, W), or standardised float32 (C, H, W).
    """
    if view.dtype == torch.uint8:
        return Image.fromarray(view.permute(1, 2, 0).contiguous().numpy())
    grey = ((view.mean(dim=0) / 4 + 0.5) * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(grey.numpy()).convert("RGB")


class Normalizer:
    """Computes (x / 255 - mean) / std, bitwise equal to timm's ``ToTensor`` and ``Normalize``.

    Views of other inputs than photographs stay as they are.

    Args:
        preprocessing: gives mean and standard deviation.
        device: device of the images.
    """

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        # Tensors on the device: CUDA multiplies by the reciprocal of a number, which rounds differently.
        self._is_rgb = preprocessing.is_rgb
        self._white = torch.tensor(255.0, device=device)
        self._mean = torch.tensor(preprocessing.mean, device=device).view(-1, 1, 1)
        self._std = torch.tensor(preprocessing.std, device=device).view(-1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """Return uint8 (B, 3, H, W) as normalised float32; float32 (B, C, H, W) unchanged."""
        if not self._is_rgb:
            return images
        return images.to(torch.float32).div_(self._white).sub_(self._mean).div_(self._std)


def build_eval_transform(preprocessing: Preprocessing) -> Transform:
    """Return the view that evaluation, prediction and the exported model use."""
    if preprocessing.kind == "array":
        return Transform(torch.from_numpy, preprocessing, is_random=False)
    steps = build_eval_steps(preprocessing)
    if preprocessing.kind == "bands":
        steps = [torch.from_numpy, *steps[:-1]]
    return Transform(v2.Compose(steps), preprocessing, is_random=False)


def build_eval_steps(preprocessing: Preprocessing) -> list[Any]:
    """Return timm's three steps to the evaluation view: resize, crop or pad, convert to a uint8 tensor."""
    view = create_transform(**preprocessing.to_timm(), is_training=False, normalize=False)
    resize, crop, to_tensor = view.transforms
    if preprocessing.kind == "bands" and preprocessing.resize == "pad":
        crop = CenterCropOrPad([*preprocessing.size])  # with 0, the mean of standardised numbers
    return [resize, crop, to_tensor]


def build_train_transform(preprocessing: Preprocessing, augmentation: Augmentation) -> Transform:
    """Return the random training view, or the evaluation view for ``none`` and for arrays."""
    if augmentation == "none" or preprocessing.kind == "array":
        return build_eval_transform(preprocessing)
    if augmentation == "shift":
        return _build_shift(preprocessing)
    smallest = _SMALLEST_CROP[augmentation]
    crop = _build_random_crop(preprocessing, smallest)
    steps = [*crop, v2.RandomHorizontalFlip(), *_distortions(augmentation, preprocessing), v2.PILToTensor()]
    if augmentation == "heavy":
        steps.append(_erase_at_random)
    if preprocessing.kind == "bands":  # colours are not distorted: there are none
        steps = [torch.from_numpy, *crop, v2.RandomHorizontalFlip()]
    return _build_random(steps, preprocessing, _compute_short_side(max(preprocessing.size), smallest))


def _build_random_crop(preprocessing: Preprocessing, smallest: float) -> list[Any]:
    """Return the steps to a random crop at the input size, with objects of about the shape of evaluation.

    The crop of an image that is squashed has the aspect ratio of the image, so that it is squashed as much;
    an image that is padded is padded before it is cropped.
    """
    height, width = preprocessing.size
    interpolation = InterpolationMode(preprocessing.interpolation)
    if preprocessing.resize == "squash":
        return [_SquashedCrop((height, width), smallest, interpolation)]
    aspect = width / height
    if preprocessing.resize == "pad":
        return [_PaddedCrop((height, width), smallest, interpolation, _mean_colour(preprocessing))]
    ratio = (aspect * _NARROWEST, aspect / _NARROWEST)
    return [v2.RandomResizedCrop((height, width), (smallest, 1.0), ratio, interpolation, antialias=True)]


@dataclass(frozen=True)
class _SquashedCrop:
    """Takes a random crop of about the image's own aspect ratio, and resizes it to another.

    Attributes:
        size: height and width of the result in pixels.
        smallest: smallest share of the image's area.
        interpolation: resampling filter.
    """

    size: tuple[int, int]
    smallest: float
    interpolation: InterpolationMode

    def __call__(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        height, width = v2.functional.get_size(image)
        aspect = width / height
        ratio = [aspect * _NARROWEST, aspect / _NARROWEST]
        box = RandomResizedCrop.get_params(image, [self.smallest, 1.0], ratio)
        view: Image.Image | Tensor = v2.functional.resized_crop(
            image, *box, [*self.size], self.interpolation, antialias=True
        )
        return view


@dataclass(frozen=True)
class _PaddedCrop:
    """Takes a random crop of an image that is padded to the aspect ratio of the input, and resizes it.

    The padded image is never made: that of a long, thin one would not fit in the memory.

    Attributes:
        size: height and width of the result in pixels.
        smallest: smallest share of the padded image's area.
        interpolation: resampling filter.
        colour: red, green and blue from 0 to 255; one number for all channels of bands.
    """

    size: tuple[int, int]
    smallest: float
    interpolation: InterpolationMode
    colour: list[int] | int

    def __call__(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        height, width = v2.functional.get_size(image)
        aspect = self.size[1] / self.size[0]
        wide, high = max(width, round(height * aspect)), max(height, round(width / aspect))
        padded = torch.empty(1, high, wide, device="meta")
        ratio = [aspect * _NARROWEST, aspect / _NARROWEST]
        top, left, *box = RandomResizedCrop.get_params(padded, [self.smallest, 1.0], ratio)
        # Coordinates of the crop in the image: negative or too large where it is padding.
        top, left = top - (high - height) // 2, left - (wide - width) // 2
        rows = _place(top, box[0], height, self.size[0])
        columns = _place(left, box[1], width, self.size[1])
        seen: Image.Image | Tensor = v2.functional.resized_crop(
            image,
            *(rows.start, columns.start, rows.length, columns.length),
            [rows.drawn, columns.drawn],
            self.interpolation,
            antialias=True,
        )
        edges = [columns.before, rows.before, columns.after, rows.after]
        view: Image.Image | Tensor = v2.functional.pad(seen, edges, self.colour)
        return view


class _Placed(NamedTuple):
    """One axis of a crop that is partly outside the image.

    Attributes:
        start: first pixel of the image.
        length: pixels of the image, at least 1.
        before: pixels of padding before it in the view.
        drawn: pixels of the view that show the image, at least 1.
        after: pixels of padding after it.
    """

    start: int
    length: int
    before: int
    drawn: int
    after: int


def _place(start: int, length: int, available: int, size: int) -> _Placed:
    """Return what a crop shows of an axis.

    Args:
        start: first pixel of the crop, negative before the image.
        length: pixels of the crop.
        available: pixels of the image.
        size: pixels of the view.
    """
    first = min(max(start, 0), available - 1)
    last = max(min(start + length, available), first + 1)
    before = min(max(round((first - start) * size / length), 0), size - 1)
    end = max(min(round((last - start) * size / length), size), before + 1)
    return _Placed(first, last - first, before, end - before, size - end)


def _build_shift(preprocessing: Preprocessing) -> Transform:
    """Return the image at the input size, moved by up to an eighth of it, and mirrored (arXiv:1409.5185).

    For images of 32 pixels: padded by 4 pixels on each side, of which a random crop of 32 pixels is taken.
    """
    height, width = preprocessing.size
    steps = [
        *build_eval_steps(replace(preprocessing, crop_pct=1.0))[:2],
        v2.RandomCrop((height, width), [width // 8, height // 8], fill=_mean_colour(preprocessing)),
        v2.RandomHorizontalFlip(),
        v2.PILToTensor(),
    ]
    if preprocessing.kind == "bands":
        steps = [torch.from_numpy, *steps[:-1]]
    return _build_random(steps, preprocessing, max(height, width))


def _build_random(steps: list[Any], preprocessing: Preprocessing, short_side: int) -> Transform:
    # A user of "nearest" wants no interpolated colours, so the image is not reduced.
    interpolates = preprocessing.interpolation != "nearest"
    return Transform(v2.Compose(steps), preprocessing, True, short_side if interpolates else None)


def _mean_colour(preprocessing: Preprocessing) -> list[int] | int:
    """Return the colour, from 0 to 255, that the network's normalisation maps to zero; 0 for bands."""
    if preprocessing.kind == "bands":
        return 0
    return [round(255 * channel) for channel in preprocessing.mean]


def _compute_short_side(longest: int, smallest_crop: float) -> int:
    """Return the shorter side of an image, in pixels, from which no random crop has to be enlarged.

    The smallest crop of a square of side s has the shorter side s sqrt(smallest x narrowest); that of other
    images is larger. ``longest`` is the longer side of the input. Accuracy is the same as with full images
    (``benchmarks/draft.py``).
    """
    return math.ceil(longest / math.sqrt(smallest_crop * _NARROWEST))


def _distortions(augmentation: Augmentation, preprocessing: Preprocessing) -> list[Any]:
    """Return the operations on colour and shape: none, one of random strength, or several strong ones."""
    keys: dict[str, Any] = {
        "interpolation": InterpolationMode.BILINEAR,
        "fill": _mean_colour(preprocessing),
    }
    if augmentation == "medium":
        return [v2.TrivialAugmentWide(**keys)]  # arXiv:2103.10158: nothing to tune
    if augmentation == "heavy":
        return [v2.RandAugment(num_ops=2, magnitude=9, **keys)]  # arXiv:1909.13719
    return []


def _erase_at_random(image: Tensor) -> Tensor:
    """Fill a random rectangle with uint8 noise, with probability 0.25 (arXiv:1708.04896).

    torchvision's ``RandomErasing`` draws normal values around zero, which are wrong for uint8.
    """
    if torch.rand(1).item() >= 0.25:
        return image
    top, left, height, width, _ = RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])
    if (height, width) != image.shape[
        1:
    ]:  # the whole image means that torchvision found no rectangle that fits
        noise = torch.randint(0, 256, (len(image), height, width), dtype=torch.uint8)
        image[:, top : top + height, left : left + width] = noise
    return image
