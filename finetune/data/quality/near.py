"""Near copies: the same image in another size, with another compression or in grey.

Two measures must agree. The first, ImageHash's perceptual hash, is cheap enough to compare every image with
every other, but it confuses digits, line drawings and dark images. The second is the correlation of two
thumbnails. Measured on photographs of ants and bees, photographs of 64 pixels and scikit-learn's digits
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
from finetune.data.quality.subject import ScannedDataset
from finetune.errors import count

MOST_BITS = 8
"""Largest number of the 64 bits in which the perceptual hashes of near copies differ."""
LEAST_CORRELATION = 0.995
"""Smallest correlation of the thumbnails of near copies."""
LEAST_CONTRAST = 4.0
"""Standard deviation of a thumbnail's grey levels below which an image is too plain to be compared."""
MOST_COMPARISONS = 4_000_000_000
"""Largest number of comparisons of hashes, about ten seconds of one core. If it is exceeded, only images of
different splits are compared, up to ten times as often; beyond that none are."""
MOST_PAIRS = 100_000
"""Largest number of pairs across splits, and the same within splits: a long video must not hide a leak."""
_BLOCK = 2**22
_STEP = 4096


@dataclass(frozen=True)
class NearCopy:
    """Two images that are nearly the same, as indices into ``ScannedDataset.samples``."""

    first: int
    second: int
    correlation: float


@dataclass(frozen=True)
class NearCopies:
    """The result of a search for near copies.

    Attributes:
        pairs: pairs of near copies, the highest correlation first.
        scope: whether ``all`` images were compared, only those ``across`` splits, or ``none``.
        is_cut: whether the search ended at ``MOST_PAIRS``, so that there may be more pairs.
    """

    pairs: tuple[NearCopy, ...]
    scope: str
    is_cut: bool = False

    def leaks(self, scanned: ScannedDataset) -> list[NearCopy]:
        """Return the pairs that lie in two splits."""
        return [pair for pair in self.pairs if scanned.splits[pair.first] != scanned.splits[pair.second]]

    def conflicts(self, scanned: ScannedDataset) -> list[NearCopy]:
        """Return the pairs with two labels."""
        return [pair for pair in self.pairs if scanned.labels[pair.first] != scanned.labels[pair.second]]

    def others(self, scanned: ScannedDataset) -> list[NearCopy]:
        """Return the pairs of one split and one label."""
        reported = {*self.leaks(scanned), *self.conflicts(scanned)}
        return [pair for pair in self.pairs if pair not in reported]


def find_near(scanned: ScannedDataset) -> NearCopies:
    """Return pairs of images that are nearly the same, but not byte for byte.

    Pairs across splits are searched first: leaks matter most.
    """
    usable = np.flatnonzero(scanned.contrasts >= LEAST_CONTRAST)
    sizes = np.bincount(scanned.splits[usable], minlength=len(SPLITS)).tolist()
    across = (len(usable) ** 2 - sum(size**2 for size in sizes)) // 2
    if len(usable) ** 2 // 2 <= MOST_COMPARISONS:
        scope, searches = (
            "all",
            [_blocks_across(usable, scanned.splits), _blocks_within(usable, scanned.splits)],
        )
    elif across <= 10 * MOST_COMPARISONS:
        scope, searches = "across", [_blocks_across(usable, scanned.splits)]
    else:
        return NearCopies((), "none")
    pairs: list[NearCopy] = []
    is_cut = False
    for blocks in searches:
        found = chain.from_iterable(_compare(scanned, rows, columns) for rows, columns in blocks)
        pairs += islice(found, MOST_PAIRS)
        is_cut |= next(found, None) is not None
    pairs.sort(key=lambda pair: (-pair.correlation, pair.first, pair.second))
    return NearCopies(tuple(pairs), scope, is_cut)


def _blocks_within(
    usable: NDArray[np.int64], splits: NDArray[np.int8]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield blocks of image indices to compare within each split; a pair may occur twice in a block."""
    for split in range(len(SPLITS)):
        own = usable[splits[usable] == split]
        step = max(1, min(_STEP, _BLOCK // max(1, len(own))))
        for start in range(0, len(own), step):
            yield own[start : start + step], own[start:]


def _blocks_across(
    usable: NDArray[np.int64], splits: NDArray[np.int8]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield blocks of image indices to compare across splits, each pair once."""
    for later in range(1, len(SPLITS)):
        rows, columns = usable[splits[usable] == later], usable[splits[usable] < later]
        step = max(1, min(_STEP, _BLOCK // max(1, len(columns))))
        for start in range(0, len(rows), step):
            yield rows[start : start + step], columns


def _compare(
    scanned: ScannedDataset, rows: NDArray[np.int64], columns: NDArray[np.int64]
) -> Iterator[NearCopy]:
    """Yield the near copies among the pairs of ``rows`` and ``columns`` (image indices)."""
    hashes = scanned.scan.rows["phash"]
    bits = np.bitwise_count(hashes[rows][:, None] ^ hashes[columns][None, :])
    left, right = np.nonzero(bits <= MOST_BITS)
    left, right = rows[left], columns[right]
    is_first = left < right if len(columns) and columns[0] == rows[0] else left != right
    left, right = left[is_first], right[is_first]
    for start in range(0, len(left), _STEP):
        chunk = slice(start, start + _STEP)
        alike = _correlate(scanned, left[chunk], right[chunk])
        digests = scanned.scan.rows["sha256"]
        differ = (digests[left[chunk]] != digests[right[chunk]]).any(axis=1)
        for index in np.flatnonzero((alike >= LEAST_CORRELATION) & differ):
            first, second = sorted((int(left[chunk][index]), int(right[chunk][index])))
            yield NearCopy(first, second, float(alike[index]))


def _correlate(
    scanned: ScannedDataset, left: NDArray[np.int64], right: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the correlation of the thumbnails of each pair, (N,)."""
    first, second = _standardise(scanned, left), _standardise(scanned, right)
    products: NDArray[np.float64] = (first * second).mean(axis=1)
    return products


def _standardise(scanned: ScannedDataset, indices: NDArray[np.int64]) -> NDArray[np.float64]:
    pixels = scanned.scan.rows["thumbnail"][indices].reshape(len(indices), -1).astype(np.float64)
    pixels -= pixels.mean(axis=1, keepdims=True)
    scaled: NDArray[np.float64] = pixels / pixels.std(axis=1, keepdims=True)
    return scaled


def find_near_issues(scanned: ScannedDataset, near: NearCopies) -> Iterator[Issue]:
    """Yield the issues of near copies."""
    if leaks := near.leaks(scanned):
        later = {max((pair.first, pair.second), key=lambda index: scanned.splits[index]) for pair in leaks}
        are = "is" if len(later) == 1 else "are"
        yield Issue(
            "near-leak",
            "warning",
            f"{count(len(later), 'image', 'images')} of val or test {are} nearly the same as one of another "
            "split.",
            _LEAK_FIX if not scanned.dataset.val_was_drawn else _DRAWN_FIX,
            len(later),
            scanned.paths(_indices(leaks)),
        )
    if conflicts := near.conflicts(scanned):
        yield Issue(
            "near-label-conflict",
            "warning",
            f"{count(len(conflicts), 'pair', 'pairs')} of nearly the same image under two labels.",
            "Look at them, and decide which label is right.",
            len(conflicts),
            scanned.paths(_indices(conflicts)),
        )
    others = near.others(scanned)
    if others:
        yield Issue(
            "near-duplicate",
            "note",
            f"{count(len(others), 'pair', 'pairs')} of nearly the same image in one split and class.",
            "Keep one of each, if they should not count more than others.",
            len(others),
            scanned.paths(_indices(others)),
        )
    if near.scope != "all":
        what = "only across splits" if near.scope == "across" else "not at all"
        yield Issue(
            "near-scope",
            "note",
            f"{len(scanned.samples)} images are too many to compare all: near copies were searched {what}.",
            "Check smaller parts of the data separately.",
        )
    if near.is_cut:
        yield Issue(
            "near-scope",
            "note",
            f"There are more than {MOST_PAIRS} pairs of near copies, across splits or within them; "
            "the search ended there.",
            "Remove most of the listed copies, and check again.",
        )


_LEAK_FIX = "Look at them on the sheet, and remove copies from one of the two splits."
_DRAWN_FIX = "Remove copies, or keep them together with --group-by."


def _indices(pairs: Sequence[NearCopy]) -> Iterator[int]:
    return (index for pair in pairs for index in (pair.first, pair.second))
