"""Draw what single units of a network see and show: patches, projections, feature maps and boxes.

Shape legend: H W pixels, h w positions of a map.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from finetune.plots.overlay import colour_heat
from finetune.plots.sheet import PAPER

Floats = NDArray[np.float32]
Corners = tuple[int, int, int, int]
"""Top, left, bottom and right of a box in pixels; bottom and right are outside."""
_FRAME = "#e8590c"
_PAD = "#e6e6e2"
_MOST_SHARPENED = 96
"""Images with a longer side of fewer pixels are enlarged without smoothing, so that each pixel is seen."""
_TINY = 1e-30
_SATURATED = 0.2
"""Percent of the values that get the darkest or the brightest colour."""


def crop(image: Image.Image, box: Corners) -> Image.Image:
    """Return the pixels of a box."""
    top, left, bottom, right = box
    return image.crop((left, top, right, bottom))


def fit_square(image: Image.Image, side: int) -> Image.Image:
    """Return an image scaled to a square; the shorter side is padded."""
    scale = side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    is_small = max(image.size) < min(side, _MOST_SHARPENED)
    filter = Image.Resampling.NEAREST if is_small else Image.Resampling.LANCZOS
    square = Image.new("RGB", (side, side), _PAD)
    square.paste(image.convert("RGB").resize(size, filter), ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def frame(image: Image.Image, box: Corners, side: int) -> Image.Image:
    """Return an image scaled to a square with a box drawn on it."""
    square, scale = fit_square(image, side), side / max(image.size)
    shift = (side - image.width * scale) / 2, (side - image.height * scale) / 2
    top, left, bottom, right = box
    corners = (
        max(0.0, shift[0] + left * scale - 1),
        max(0.0, shift[1] + top * scale - 1),
        min(side - 1.0, shift[0] + right * scale),
        min(side - 1.0, shift[1] + bottom * scale),
    )
    ImageDraw.Draw(square).rectangle(corners, outline=_FRAME, width=2)
    return square


def draw_projection(values: Floats) -> Image.Image:
    """Return signed values of the colours as an image: grey is zero. Of other channels it draws the mean.

    Args:
        values: (C, H, W) in any unit; the largest magnitudes become black and white.
    """
    if len(values) != 3:
        values = np.repeat(values.mean(axis=0, keepdims=True), 3, axis=0)
    largest = max(float(np.percentile(np.abs(values), 100 - _SATURATED)), _TINY)
    scaled = 0.5 + 0.5 * values / largest
    return Image.fromarray(np.rint(np.clip(scaled, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0))


def draw_map(values: Floats, side: int) -> Image.Image:
    """Return a feature map (h, w) as a square image: black is its least value, bright its largest."""
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return fit_square(colour_heat(scaled), side)


def blank(side: int) -> Image.Image:
    """Return a square in the colour of a sheet, for a place without a tile."""
    return Image.new("RGB", (side, side), PAPER)


def draw_mosaic(images: Sequence[Image.Image], side: int, columns: int = 3) -> Image.Image:
    """Return images on a square, row by row, each on its own square; places without one stay grey."""
    cell = side // columns
    mosaic = Image.new("RGB", (side, side), _PAD)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        mosaic.paste(fit_square(image, cell - 2), (column * cell, row * cell))
    return mosaic
