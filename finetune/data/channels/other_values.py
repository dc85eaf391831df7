"""Images whose numbers are other than those that a model was trained on: of 8 bits instead of 16, say."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.channels.arrays import Planes
from finetune.data.channels.bands import read_bands
from finetune.data.channels.depth import FULL, ValueRange
from finetune.data.decode import BadImageError, read_spread
from finetune.data.formats import is_array_name
from pretrained.preprocessing import Preprocessing

TRIED = 10
"""Images to look at: those of a data set have one depth."""
_EIGHT_BITS = 255.0
"""The largest number of an image of 8 bits."""
_FAR = 10.0
"""Deviations from the mean in training beyond which the mean of images is one of other units."""


def describe_other_values(preprocessing: Preprocessing, files: Sequence[Path]) -> str | None:
    """Return a warning if the numbers of images are not like those of a model's training images, else None.

    Certain cases only: images of 8 bits where the model's mean and deviation cannot be those of 8 bits, or
    its range of values is another; and numbers that are far from the mean. Files that cannot be read, and
    models without such numbers, are left out.

    Args:
        preprocessing: that of the model.
        files: images or arrays, some of those that the model shall answer for.
    """
    if preprocessing.kind == "bands" and preprocessing.mean and preprocessing.std:
        return _compare_bands(preprocessing, files)
    if preprocessing.is_rgb and preprocessing.value_range not in (None, FULL):
        return _compare_range(preprocessing.value_range, files)
    return None


def _compare_range(value_range: ValueRange | None, files: Sequence[Path]) -> str | None:
    depths = []
    for file in files:
        with suppress(BadImageError):
            depths.append(_is_deep(file))
    if not depths or any(depths) or value_range is None:
        return None
    low, high = value_range
    return (
        "these images have 8 bits (0 to 255), and the model was trained on images of more, of which "
        f"{low:g} to {high:g} become black to white: its answers are wrong if 0 and 255 mean something else"
    )


def _compare_bands(preprocessing: Preprocessing, files: Sequence[Path]) -> str | None:
    found: list[Planes] = []
    depths = []
    for file in files:
        with suppress(BadImageError):
            found.append(read_bands(file, preprocessing.channels))
            depths.append(_is_deep(file))
    if not found:
        return None
    mean, std = np.array(preprocessing.mean), np.array(preprocessing.std)
    middle = np.mean([planes.mean(axis=(1, 2), dtype=np.float64) for planes in found], axis=0)
    is_far = bool((np.abs(middle - mean) > _FAR * std).any())
    if not is_far and (any(depths) or _fits_eight_bits(mean, std)):
        return None
    low, high = min(planes.min() for planes in found), max(planes.max() for planes in found)
    kind = "these images" if any(depths) else "these images of 8 bits"
    return (
        f"{kind} hold numbers from {low:g} to {high:g}, and those that the model was trained on have "
        f"the mean {mean.mean():.4g} and the deviation {std.mean():.4g}: "
        "its answers are wrong if the unit is another"
    )


def _is_deep(file: Path) -> bool:
    """Return whether a file may hold numbers beyond 255."""
    return is_array_name(file.name) or read_spread(file) is not None


def _fits_eight_bits(mean: NDArray[Any], std: NDArray[Any]) -> bool:
    """Return whether numbers from 0 to 255 can have these means and deviations.

    Their variance is at most mean * (255 - mean) (Bhatia and Davis 2000, doi:10.2307/2589180).
    """
    return bool((std**2 <= mean * (_EIGHT_BITS - mean) + 1e-3).all())
