"""Draw a heat map over the image that it explains.

The colours are matplotlib's inferno: their lightness rises with the value, so that colour-blind readers and
grey prints show the same order. Where there is no evidence the image stays as it is, in grey.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MOST_COVER = 0.75
"""Opacity of the heat map where the evidence is strongest."""
_DARKEST = 0.25
"""Position in the colour map of the weakest evidence; lower positions are nearly black, like shadow."""


def draw_overlay(image: Image.Image, heat: NDArray[np.float32]) -> Image.Image:
    """Return the image (RGB, of the same size) with the heat map drawn over it.

    Args:
        image: the input of the network.
        heat: (h, w) in [0, 1]; it covers the whole image.
    """
    values = np.clip(resize_heat(heat, image.size), 0, 1)
    grey = np.asarray(image.convert("L").convert("RGB"), dtype=np.float32)
    colours = _colours()[np.rint((_DARKEST + (1 - _DARKEST) * values) * 255).astype(np.intp)]
    cover = (MOST_COVER * np.sqrt(values))[..., None]
    mixed = grey * (1 - cover) + colours * cover
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def colour_heat(values: NDArray[np.float32]) -> Image.Image:
    """Return a map (h, w) from 0 to 1 as an RGB image of as many pixels: black is 0."""
    return Image.fromarray(_colours()[np.rint(np.clip(values, 0, 1) * 255).astype(np.intp)].astype(np.uint8))


def resize_heat(heat: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Return a heat map (h, w) as (height, width), interpolated to ``size`` (width, height)."""
    small = Image.fromarray(heat.astype(np.float32))
    return np.asarray(small.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)


@cache
def _colours() -> NDArray[np.float32]:
    """Return the colour map: (256, 3), 0 to 255."""
    import matplotlib

    table = matplotlib.colormaps["inferno"](np.linspace(0, 1, 256))
    return np.asarray(table[:, :3] * 255, dtype=np.float32)
