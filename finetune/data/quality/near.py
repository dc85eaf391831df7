"""Near copies: the same image in another size, another compression or in grey.

Two measures must agree. The first, ImageHash's perceptual hash, is cheap enough to compare every image with
every other; it takes digits, line drawings and dark images for each other. The second is the correlation of
two thumbnails. Measured on photographs of ants and bees, photographs of 64 pixels and scikit-learn's digits
(docs/check.md): no pair of different images passes both, and nearly all resized and recompressed copies do.
Mirrored and clearly cropped copies are not found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from finetune.data.dataset import SPLITS, Issue
from finetune.data.layout import count
from finetune.data.quality.subject import ScannedDataset

MOST_BITS = 8
"""Of 64 in which the perceptual hashes of near copies may differ."""
LEAST_CORRELATION = 0.995
"""Of the thumbnails of near copies."""
LEAST_CONTRAST = 4.0
"""Deviation of a thumbnail's grey levels below which it is too plain to be told from others."""
MOST_COMPARISONS = 4_000_000_000
"""Of hashes: some ten seconds of one core. Beyond, images are compared across parts only, up to ten times
as many, and then not at all."""
MOST_PAIRS = 100_000
"""Of parts that differ, and as many of one split: a long video must not hide a leak."""
_BLOCK = 2**22
_STEP = 4096


@dataclass(frozen=True)
class NearCopy:
    """Two images that are nearly the same; places in ``ScannedDataset.samples``."""

    first: int
    second: int
    correlation: float


@dataclass(frozen=True)
class NearCopies:
    """Near copies that were found.

    Attributes:
        pairs: the most alike first.
        scope: ``all`` images were compared, those ``across`` parts, or ``none``.
        is_cut: there may be more; the search ended at ``MOST_PAIRS``.
    """

    pairs: tuple[NearCopy, ...]
    scope: str
    is_cut: bool = False

    def leaks(self, seen: ScannedDataset) -> list[NearCopy]:
        """Return pairs that lie in two splits."""
        return [pair for pair in self.pairs if seen.splits[pair.first] != seen.splits[pair.second]]

    def conflicts(self, seen: ScannedDataset) -> list[NearCopy]:
        """Return pairs that lie under two labels."""
        return [pair for pair in self.pairs if seen.labels[pair.first] != seen.labels[pair.second]]

    def others(self, seen: ScannedDataset) -> list[NearCopy]:
        """Return pairs of one split and one label."""
        told = {*self.leaks(seen), *self.conflicts(seen)}
        return [pair for pair in self.pairs if pair not in told]


def find_near(seen: ScannedDataset) -> NearCopies:
    """Return pairs of images that are nearly the same, but not byte for byte.

    Parts are searched against each other first: what lies in two of them weighs more than the rest.
    """
    usable = np.flatnonzero(seen.contrasts >= LEAST_CONTRAST)
    sizes = np.bincount(seen.splits[usable], minlength=len(SPLITS)).tolist()
    across = (len(usable) ** 2 - sum(size**2 for size in sizes)) // 2
    if len(usable) ** 2 // 2 <= MOST_COMPARISONS:
        scope, searches = "all", [_blocks_across(usable, seen.splits), _blocks_within(usable, seen.splits)]
    elif across <= 10 * MOST_COMPARISONS:
        scope, searches = "across", [_blocks_across(usable, seen.splits)]
    else:
        return NearCopies((), "none")
    pairs: list[NearCopy] = []
    is_cut = False
    for blocks in searches:
        found = chain.from_iterable(_compare(seen, rows, columns) for rows, columns in blocks)
        pairs += islice(found, MOST_PAIRS)
        is_cut |= next(found, None) is not None
    pairs.sort(key=lambda pair: (-pair.correlation, pair.first, pair.second))
    return NearCopies(tuple(pairs), scope, is_cut)


def _blocks_within(
    usable: NDArray[np.int64], parts: NDArray[np.int8]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield places that are to be compared with places of the same part, each pair once or twice."""
    for part in range(len(SPLITS)):
        own = usable[parts[usable] == part]
        step = max(1, min(_STEP, _BLOCK // max(1, len(own))))
        for start in range(0, len(own), step):
            yield own[start : start + step], own[start:]


def _blocks_across(
    usable: NDArray[np.int64], parts: NDArray[np.int8]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    for later in range(1, len(SPLITS)):
        rows, columns = usable[parts[usable] == later], usable[parts[usable] < later]
        step = max(1, min(_STEP, _BLOCK // max(1, len(columns))))
        for start in range(0, len(rows), step):
            yield rows[start : start + step], columns


def _compare(seen: ScannedDataset, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Iterator[NearCopy]:
    hashes = seen.scan.rows["phash"]
    bits = np.bitwise_count(hashes[rows][:, None] ^ hashes[columns][None, :])
    left, right = np.nonzero(bits <= MOST_BITS)
    left, right = rows[left], columns[right]
    is_first = left < right if len(columns) and columns[0] == rows[0] else left != right
    left, right = left[is_first], right[is_first]
    for start in range(0, len(left), _STEP):
        some = slice(start, start + _STEP)
        alike = _correlate(seen, left[some], right[some])
        digests = seen.scan.rows["sha256"]
        differ = (digests[left[some]] != digests[right[some]]).any(axis=1)
        for place in np.flatnonzero((alike >= LEAST_CORRELATION) & differ):
            one, other = sorted((int(left[some][place]), int(right[some][place])))
            yield NearCopy(one, other, float(alike[place]))


def _correlate(
    seen: ScannedDataset, left: NDArray[np.int64], right: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the correlation of the thumbnails of each pair, (N,)."""
    one, other = _standardise(seen, left), _standardise(seen, right)
    products: NDArray[np.float64] = (one * other).mean(axis=1)
    return products


def _standardise(seen: ScannedDataset, places: NDArray[np.int64]) -> NDArray[np.float64]:
    pixels = seen.scan.rows["thumbnail"][places].reshape(len(places), -1).astype(np.float64)
    pixels -= pixels.mean(axis=1, keepdims=True)
    scaled: NDArray[np.float64] = pixels / pixels.std(axis=1, keepdims=True)
    return scaled


def find_near_issues(seen: ScannedDataset, near: NearCopies) -> Iterator[Issue]:
    """Yield what is to be said of near copies."""
    if leaks := near.leaks(seen):
        later = {max((pair.first, pair.second), key=lambda place: seen.splits[place]) for pair in leaks}
        are = "is" if len(later) == 1 else "are"
        yield Issue(
            "near-leak",
            "warning",
            f"{count(len(later), 'image', 'images')} of val or test {are} nearly the same as one of another "
            "part.",
            _LEAK_FIX if not seen.dataset.val_was_drawn else _DRAWN_FIX,
            len(later),
            seen.paths(_places(leaks)),
        )
    if conflicts := near.conflicts(seen):
        yield Issue(
            "near-label-conflict",
            "warning",
            f"{count(len(conflicts), 'pair', 'pairs')} of nearly the same images under two labels.",
            "Look at them, and decide which label is right.",
            len(conflicts),
            seen.paths(_places(conflicts)),
        )
    others = near.others(seen)
    if others:
        yield Issue(
            "near-duplicate",
            "note",
            f"{count(len(others), 'pair', 'pairs')} of nearly the same images in one split and class.",
            "Keep one of each, if they should not count more than others.",
            len(others),
            seen.paths(_places(others)),
        )
    if near.scope != "all":
        what = "only across parts" if near.scope == "across" else "not at all"
        yield Issue(
            "near-scope",
            "note",
            f"{len(seen.samples)} images are too many to compare all: near copies were searched {what}.",
            "Check a part of the data separately.",
        )
    if near.is_cut:
        yield Issue(
            "near-scope",
            "note",
            f"There are more than {MOST_PAIRS} pairs of near copies, across parts or within them; the others "
            "were not looked for.",
            "Remove most of those that are listed, and check again.",
        )


_LEAK_FIX = "Look at them on the sheet, and remove copies from one of the two splits."
_DRAWN_FIX = "Remove copies, or keep them together with --group-by."


def _places(pairs: Sequence[NearCopy]) -> Iterator[int]:
    return (place for pair in pairs for place in (pair.first, pair.second))
