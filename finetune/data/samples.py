"""Real images that every installation has at hand: ``--data sample:digits``.

scikit-learn's 1,797 handwritten digits (Alpaydin and Kaynak, the test split of "Optical Recognition of
Handwritten Digits", UCI Machine Learning Repository, 1998), 8 x 8 pixels in 17 shades, as a folder of ten
classes in the user's cache. They come from 13 writers, who are not told apart: a validation split holds
writers that were trained on.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from finetune.errors import UsageError, suggest
from finetune.runs.cache_dir import make_once

PREFIX = "sample:"
_VERSION = 1
"""Of the files that are written; raised when the same name would give others."""
_WHITE = 16
"""Ink of a pixel, at most."""


def is_sample(data: str | Path) -> bool:
    """Return whether a sample is named; a folder of that name would be meant instead."""
    return str(data).startswith(PREFIX) and not os.path.lexists(data)


def open_sample(data: str | Path) -> Path:
    """Return the folder that holds a sample's class folders, written now or by an earlier call.

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
        known = ", ".join(PREFIX + one for one in SAMPLES)
        found = f"there is no sample of this name{suggest(name, SAMPLES)}"
        raise UsageError(f"--data {data}", found, f"Take {known}, or give a folder of images.")
    return name


def _write_digits(folder: Path) -> None:
    """White on black, as they were scanned; numbered in their order there."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    shades = (digits.images * 255 / _WHITE).round().astype("uint8")
    for number, (pixels, label) in enumerate(zip(shades, digits.target, strict=True)):
        path = folder / str(label) / f"{number:04}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)


SAMPLES: dict[str, Callable[[Path], None]] = {"digits": _write_digits}
"""What writes the class folders of each."""
