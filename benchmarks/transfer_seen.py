"""Which images of a benchmark the bundled backbone may have met: copies among those it was trained on.

Photographs wander between data sets at other sizes and crops, which no hash of the file sees. Both are made
16 x 16 pixels, as a centre crop and squashed, and whatever correlates over 0.9 counts as met: a few too many,
for plain backgrounds are alike as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

SIDE = 16
LIMIT = 0.9
"""Of correlation: docs/transfer.md has the counts."""
_BLOCK = 2048

Floats = NDArray[np.float32]


def find_seen(images: Sequence[Path], source: Sequence[Path], kept: Path) -> set[Path]:
    """Return the images of which there is a small copy in ``source``.

    Args:
        images: to judge.
        source: what was trained on.
        kept: a file that remembers the answer; the same name must mean the same images.
    """
    if not kept.exists():
        found = compute_likeness(images, source)
        kept.write_text(
            json.dumps({str(path): round(float(one), 4) for path, one in zip(images, found, strict=True)})
        )
    known = json.loads(kept.read_text(encoding="utf-8"))
    return {path for path in images if known[str(path)] > LIMIT}


def compute_likeness(images: Sequence[Path], source: Sequence[Path]) -> Floats:
    """Return the highest correlation of each image with any of ``source``, (N,)."""
    others = _read_thumbnails(tuple(source))
    found = []
    for views in _thumbnails(images):
        blocks = [
            views @ others[start : start + 16 * _BLOCK].T for start in range(0, len(others), 16 * _BLOCK)
        ]
        found.append(np.max([block.max(1) for block in blocks], axis=0).reshape(-1, 2).max(1))
    return np.concatenate(found)


@cache
def _read_thumbnails(paths: tuple[Path, ...]) -> Floats:
    return np.concatenate(list(_thumbnails(paths)))


def _thumbnails(paths: Sequence[Path]) -> Iterator[Floats]:
    """Yield blocks of views, (2 x images, 768), each with mean 0 and norm 1."""
    for start in range(0, len(paths), _BLOCK):
        views = np.stack([view for path in paths[start : start + _BLOCK] for view in _views(path)])
        views -= views.mean(1, keepdims=True)
        yield views / np.maximum(np.linalg.norm(views, axis=1, keepdims=True), 1e-6)


def _views(path: Path) -> list[Floats]:
    with Image.open(path) as image:
        image.draft("RGB", (4 * SIDE, 4 * SIDE))
        image = image.convert("RGB")
    sizes = (ImageOps.fit(image, (SIDE, SIDE)), image.resize((SIDE, SIDE)))
    return [np.asarray(view, dtype=np.float32).ravel() for view in sizes]
