"""The contact sheet of a report: the images that its issues concern."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from finetune.data.quality.copies import Group
from finetune.data.quality.near import NearCopy
from finetune.data.quality.report import QualityReport
from finetune.data.quality.subject import ScannedDataset
from finetune.data.thumbnail import load_thumbnail
from finetune.plots.sheet import CELL, Section, Tile

MOST_TILES = 12
"""Most tiles of a section: two rows."""


def find_sections(report: QualityReport) -> list[Section]:
    """Return a section of tiles for each kind of issue that has images, the most serious kind first."""
    scanned, odd = report.scanned, report.oddities
    near_leaks, near_conflicts = report.near.leaks(scanned), report.near.conflicts(scanned)
    plain = [index for index in odd.plain if index not in {*odd.odd, *odd.named}]
    sections = [
        _copies(scanned, "The same image in two splits", report.copies.leaks),
        _copies(scanned, "The same image under two labels", report.copies.conflicts),
        _pairs(scanned, "Nearly the same image in two splits (pairs)", near_leaks),
        _pairs(scanned, "Nearly the same image under two labels (pairs)", near_conflicts),
        _single(scanned, "The same image repeatedly", [group[0] for group in report.copies.repeated]),
        _single(scanned, "Placeholders, and images unlike all others", dict.fromkeys([*odd.named, *odd.odd])),
        _single(scanned, "Of one colour", plain),
        _single(scanned, "In another format than the name says", odd.disguised),
        _single(scanned, "Several frames", odd.animated),
        _single(scanned, "Very long", odd.long),
        _single(scanned, "Very small", odd.small),
    ]
    return [section for section in sections if section.total]


def _copies(scanned: ScannedDataset, title: str, groups: Sequence[Group]) -> Section:
    """Return a section with two images of each group, of different splits or labels where there are any."""
    pairs = [(group[0], _different(scanned, group)) for group in groups]
    indices = [index for pair in pairs[: MOST_TILES // 2] for index in pair]
    return Section(
        title, 2 * len(groups), [_tile(scanned, index, _size(scanned, index)) for index in indices]
    )


def _different(scanned: ScannedDataset, group: Group) -> int:
    """Return the first image of a group with another split or label than its first one; else the second."""
    first = scanned.describe(group[0])
    return next((index for index in group if scanned.describe(index) != first), group[1])


def _pairs(scanned: ScannedDataset, title: str, pairs: Sequence[NearCopy]) -> Section:
    tiles = [
        _tile(scanned, index, f"alike {pair.correlation:.4f}, {_size(scanned, index)}")
        for pair in pairs[: MOST_TILES // 2]
        for index in (pair.first, pair.second)
    ]
    return Section(title, 2 * len(pairs), tiles)


def _single(scanned: ScannedDataset, title: str, indices: Iterable[int]) -> Section:
    found = list(indices)
    return Section(title, len(found), list(_with_format(scanned, islice(found, MOST_TILES))))


def _with_format(scanned: ScannedDataset, indices: Iterable[int]) -> Iterator[Tile]:
    for index in indices:
        kind = f"{scanned.scan.format_of(index)} {scanned.scan.mode_of(index)}, {_size(scanned, index)}"
        yield _tile(scanned, index, kind)


def _tile(scanned: ScannedDataset, index: int, detail: str) -> Tile:
    sample = scanned.samples[index]
    image = load_thumbnail(scanned.dataset.file(sample), CELL, scanned.value_range)
    return Tile(image, (scanned.describe(index), detail, Path(sample.path).name))


def _size(scanned: ScannedDataset, index: int) -> str:
    return f"{scanned.scan.rows['width'][index]} x {scanned.scan.rows['height'][index]}"
