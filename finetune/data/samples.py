"""Built-in sample datasets: ``--data sample:digits``.

These are scikit-learn's 1,797 handwritten digits (Alpaydin and Kaynak, the test split of "Optical Recognition
of Handwritten Digits", UCI Machine Learning Repository, 1998), 8 x 8 pixels in 17 shades, written as a folder
of ten classes into the user's cache. They come from 13 writers, who are not recorded: training and validation
share writers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from finetune.errors import UsageError, suggest
from finetune.runs.cache_dir import make_once

PREFIX = "sample:"
_VERSION = 1
"""Version of the written files; raised whenever a sample's content changes."""
_WHITE = 16
"""Largest value of a pixel in scikit-learn's data."""


def is_sample(data: str | Path) -> bool:
    """Return whether ``data`` names a sample; an existing file or folder of that name takes precedence."""
    return str(data).startswith(PREFIX) and not os.path.lexists(data)


def open_sample(data: str | Path) -> Path:
    """Return the folder with a sample's class folders; it is written on the first call.

    Raises:
        UsageError: there is no sample of this name.
        DiskError: the cache cannot be written.
    """
    name = check_sample(data)
    return make_once("samples", f"{name}-{_VERSION}", SAMPLES[name])


def check_sample(data: str | Path) -> str:
    """Return the name of a sample without its prefix.

    Raises:
        UsageError: there is no sample of this name.
    """
    name = str(data).removeprefix(PREFIX)
    if name not in SAMPLES:
        known = ", ".join(PREFIX + sample for sample in SAMPLES)
        found = f"there is no sample of this name{suggest(name, SAMPLES)}"
        raise UsageError(f"--data {data}", found, f"Take {known}, or give a folder of images.")
    return name


def _write_digits(folder: Path) -> None:
    """Write the images, white on black as they were scanned, numbered in scikit-learn's order."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    shades = (digits.images * 255 / _WHITE).round().astype("uint8")
    for number, (pixels, label) in enumerate(zip(shades, digits.target, strict=True)):
        path = folder / str(label) / f"{number:04}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)


SAMPLES: dict[str, Callable[[Path], None]] = {"digits": _write_digits}
"""Function that writes the class folders, by name of the sample."""
