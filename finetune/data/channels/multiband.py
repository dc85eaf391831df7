"""TIFFs of any number of bands, which Pillow does not read."""

from __future__ import annotations

import logging
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL.Image import Transpose

from finetune.data.channels.tiff import read_layout
from finetune.data.decode import MAX_BYTES, BadImageError, describe_fault, find_upright
from finetune.data.limits import MAX_PARTS, MAX_PIXELS, TimedFile
from finetune.system.regular_files import open_regular

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it names no file; what matters is raised
_TURNS = {
    Transpose.FLIP_LEFT_RIGHT: lambda pixels: pixels[:, ::-1],
    Transpose.ROTATE_180: lambda pixels: pixels[::-1, ::-1],
    Transpose.FLIP_TOP_BOTTOM: lambda pixels: pixels[::-1],
    Transpose.TRANSPOSE: lambda pixels: pixels.swapaxes(0, 1),
    Transpose.ROTATE_270: lambda pixels: np.rot90(pixels, -1),
    Transpose.TRANSVERSE: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    Transpose.ROTATE_90: lambda pixels: np.rot90(pixels, 1),
}
"""What brings pixels (H, W) or (H, W, C) upright."""
_ORIENTATION = 274


def turn_pixels(pixels: NDArray[Any], turn: Transpose | None) -> NDArray[Any]:
    """Return pixels (H, W) or (H, W, C), transposed as Pillow transposes an image."""
    return pixels if turn is None else _TURNS[turn](pixels)


def count_bands(path: Path) -> int | None:
    """Return the number of bands of a TIFF; None for another file, or one that cannot be read."""
    with suppress(OSError), open_regular(path) as file:
        layout = read_layout(file)
        return None if layout is None else layout.bands
    return None


def read_tiff(path: Path) -> NDArray[Any]:
    """Return the numbers of the first page of a TIFF, upright: (H, W) or (H, W, C).

    Raises:
        BadImageError: the file is missing, no TIFF, damaged, compressed in a way that is not read, or larger
            than ``MAX_PIXELS`` or ``MAX_BYTES``.
    """
    try:
        with open_regular(path) as opened, TimedFile(opened) as file:
            layout = read_layout(file)
            if layout is None:
                raise BadImageError("no TIFF that can be read; other images have 1 or 3 channels")
            if layout.parts > MAX_PARTS:
                raise BadImageError(str(layout.fault))
            file.seek(0)
            with tifffile.TiffFile(file, name=path.name) as tiff:
                return _read_page(tiff.pages.first)
    except (BadImageError, MemoryError):
        raise
    except Exception as error:
        if "imagecodecs" in str(error):
            raise BadImageError("compressed in a way that needs the package imagecodecs") from error
        raise BadImageError(describe_fault(path, error)) from error


def _read_page(page: tifffile.TiffPage) -> NDArray[Any]:
    size = page.imagewidth * page.imagelength
    if page.dtype is None:
        raise BadImageError("a TIFF of numbers that NumPy has not")
    if not 0 < size <= MAX_PIXELS or math.prod(page.shape) * page.dtype.itemsize > MAX_BYTES:
        found = f"{page.imagewidth} x {page.imagelength} pixels of {page.samplesperpixel} bands"
        raise BadImageError(f"{found}, more than is read")
    values = page.asarray(maxworkers=1)
    if page.axes == "SYX":  # planar
        values = np.moveaxis(values, 0, 2)
    elif page.axes not in ("YX", "YXS"):
        raise BadImageError(f"a TIFF with the axes {page.axes}, and not rows, columns and bands")
    tag = page.tags.get(_ORIENTATION)
    return turn_pixels(values, find_upright(None if tag is None else tag.value))
