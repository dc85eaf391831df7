"""Draw a heat map over the image it explains.

The colours are matplotlib's inferno: their lightness rises with the value, so that colour-blind people and
grey printers see the same order. Where there is no evidence the image stays as it is, in grey.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

MOST_COVER = 0.75
"""Share of the image that the strongest evidence hides."""
_DARKEST = 0.25
"""Where in the colours the faintest evidence lies; below is near black, which looks like shadow."""


def draw_overlay(image: Image.Image, heat: Tensor) -> Image.Image:
    """Return the image (RGB, of its own size) under its heat map.

    Args:
        image: what the network saw.
        heat: (h, w) in [0, 1], over the whole image.
    """
    values = np.clip(resize_heat(heat, image.size), 0, 1)
    grey = np.asarray(image.convert("L").convert("RGB"), dtype=np.float32)
    colours = _colours()[np.rint((_DARKEST + (1 - _DARKEST) * values) * 255).astype(np.intp)]
    cover = (MOST_COVER * np.sqrt(values))[..., None]
    mixed = grey * (1 - cover) + colours * cover
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def resize_heat(heat: Tensor, size: tuple[int, int]) -> NDArray[np.float32]:
    """Return a map (h, w) as (height, width) of ``size`` (width, height), smooth between positions."""
    small = Image.fromarray(heat.numpy().astype(np.float32))
    return np.asarray(small.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)


@cache
def _colours() -> NDArray[np.float32]:
    """(256, 3), 0 to 255."""
    import matplotlib

    table = matplotlib.colormaps["inferno"](np.linspace(0, 1, 256))
    return np.asarray(table[:, :3] * 255, dtype=np.float32)
