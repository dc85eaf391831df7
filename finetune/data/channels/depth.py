"""Images of more than 8 bits a channel: their values, and the range of values that becomes black to white.

::

    file of 16 bits -> values (H, W) or (H, W, 3) -> (value - low) / (high - low) * 255 -> RGB of 8 bits

A sensor of 10 or 12 bits fills a small part of a 16-bit file: with the file's own range, an image would keep
2 to 16 of 256 levels. The range is therefore measured on the training images, once for the whole data set,
and kept with the model. It is never measured for a single image, which would lose how bright the images are
in comparison.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ValueRange = tuple[float, float]
"""The values that become 0 and 255; others are clipped."""
FULL: ValueRange = (0.0, 65535.0)
"""Range of 16-bit files."""
_WHITE = FULL[1]
_TAIL = 0.001
"""Share of the darkest and of the brightest pixels of an image that may be outliers (hot pixels)."""
_MOST_LOSS = 2.0
"""Outliers count unless the range with them is so many times the range without them."""


@dataclass(frozen=True, slots=True)
class Values:
    """The spread of the values of one image.

    Attributes:
        low: 0.1 % of the values are lower.
        high: 0.1 % of the values are higher.
        smallest: the smallest value.
        largest: the largest value.
    """

    low: float
    high: float
    smallest: float
    largest: float


def measure_values(pixels: NDArray[Any]) -> Values:
    """Return the spread of an image's values, of any shape."""
    flat = pixels.reshape(-1)
    rank = int(_TAIL * (flat.size - 1))
    ranks = (rank, flat.size - 1 - rank)
    low, high = np.partition(flat, ranks)[list(ranks)].tolist()
    return Values(float(low), float(high), float(flat.min()), float(flat.max()))


def find_range(images: Iterable[Values]) -> ValueRange | None:
    """Return the range of values of some images; None for no image.

    16-bit files that use more than half of their range keep it. Otherwise it is that of the values, without
    outliers if these would cost more than half of the levels.
    """
    found = list(images)
    if not found:
        return None
    low, high = min(one.low for one in found), max(one.high for one in found)
    smallest, largest = min(one.smallest for one in found), max(one.largest for one in found)
    if high == low or largest - smallest <= _MOST_LOSS * (high - low):
        low, high = smallest, largest
    if FULL[0] <= low <= high <= FULL[1] and high - low > (FULL[1] - FULL[0]) / 2:
        return FULL
    return (low, high) if high > low else (low, low + 1.0)


def is_deep(image: Image.Image) -> bool:
    """Return whether an open image, not loaded yet, has more than 8 bits a channel."""
    return image.mode == "F" or image.mode.startswith("I") or _raw_mode(image) is not None


def read_values(image: Image.Image, file: BinaryIO, over_white: bool = False) -> NDArray[Any]:
    """Return the values of a deep image: (H, W) greys or (H, W, 3), in the orientation of the file.

    Args:
        image: open; its pixels are loaded.
        file: the file that it was opened from.
        over_white: lay transparent pixels over 65535, as those of 8 bits lie over white, since the colours
            under them are undefined; False returns the colours alone.
    """
    raw = _raw_mode(image)
    if raw is None:
        image.load()
        return np.asarray(image)
    values = _read_wide(image, file, raw)
    if "A" not in image.getbands():
        return values
    colours, opacity = values[..., :-1], values[..., -1:]
    is_multiplied = raw.startswith("RGBa")
    if over_white and (opacity < _WHITE).any():
        share = 1.0 if is_multiplied else opacity / _WHITE
        colours = colours * share + (_WHITE - opacity)
    elif is_multiplied:
        colours = np.minimum(colours / np.maximum(opacity / _WHITE, 1 / _WHITE), _WHITE)
    return colours[..., 0] if colours.shape[2] == 1 else colours


def _read_wide(image: Image.Image, file: BinaryIO, raw: str) -> NDArray[Any]:
    """Return all channels of an image of 16 bits each as stored, (H, W, C), the transparency last."""
    if raw == "LA;16B":  # no unpacker gives its low bytes, but its four bytes can be read as four channels
        pairs = _reread(image, file, "RGBA").astype(np.uint16)
        return pairs[..., 0::2] << 8 | pairs[..., 1::2]
    image.load()
    # The unpacker for the other byte order takes the low byte where this one takes the high byte.
    stored = raw.replace("RGBa", "RGBA")  # the other one divides by the transparency
    other = stored.replace(";16L", ";16B") if ";16L" in stored else stored.replace(";16B", ";16L")
    high = np.asarray(image) if stored == raw else _reread(image, file, stored)
    return high.astype(np.uint16) << 8 | _reread(image, file, other)


def _raw_mode(image: Image.Image) -> str | None:
    """Return Pillow's unpacker of an image that it reduces from 16 to 8 bits a channel, or None."""
    tiles = getattr(image, "tile", None)
    if not tiles or image.mode not in ("RGB", "RGBA", "LA"):
        return None
    arguments = tiles[0].args
    raw = arguments if isinstance(arguments, str) else arguments[0] if arguments else None
    if not isinstance(raw, str) or ";16" not in raw:
        return None
    return raw.replace(";16N", ";16L" if sys.byteorder == "little" else ";16B")


def _reread(image: Image.Image, file: BinaryIO, raw: str) -> NDArray[np.uint8]:
    """Decode a file once more with another unpacker."""
    file.seek(0)
    with Image.open(file, formats=(str(image.format),)) as again:
        again.tile = [_with_raw_mode(tile, raw) for tile in again.tile]
        again.load()
        return np.asarray(again)


def _with_raw_mode(tile: Any, raw: str) -> Any:
    """Return a tile of an open image that is decoded by another unpacker."""
    arguments = tile.args
    return tile._replace(args=raw if isinstance(arguments, str) else (raw, *arguments[1:]))


def to_eight_bits(pixels: NDArray[Any], value_range: ValueRange) -> Image.Image:
    """Return values (H, W) or (H, W, 3) as an image of 8 bits a channel, rounded to the nearest level."""
    low, high = value_range
    scale = 255.0 / (high - low)
    levels = (pixels.astype(np.float32) - np.float32(low)) * np.float32(scale)
    return Image.fromarray((np.clip(levels, 0, 255) + np.float32(0.5)).astype(np.uint8))
