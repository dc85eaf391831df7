"""The sheet of the worst cases: what words cannot show."""

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
"""Of a section: two rows."""


def find_sections(report: QualityReport) -> list[Section]:
    """Return the worst cases of a report, the gravest kind first."""
    seen, odd = report.seen, report.oddities
    near_leaks, near_conflicts = report.near.leaks(seen), report.near.conflicts(seen)
    plain = [place for place in odd.plain if place not in {*odd.odd, *odd.named}]
    every = [
        _copies(seen, "The same image in two splits", report.copies.leaks),
        _copies(seen, "The same image under two labels", report.copies.conflicts),
        _pairs(seen, "Nearly the same image in two splits (pairs)", near_leaks),
        _pairs(seen, "Nearly the same image under two labels (pairs)", near_conflicts),
        _single(seen, "The same image repeatedly", [group[0] for group in report.copies.repeated]),
        _single(seen, "Placeholders, and unlike all others", dict.fromkeys([*odd.named, *odd.odd])),
        _single(seen, "Of one colour", plain),
        _single(seen, "Not what the name says", odd.disguised),
        _single(seen, "Several frames", odd.animated),
        _single(seen, "Very long", odd.long),
        _single(seen, "Very small", odd.small),
    ]
    return [section for section in every if section.total]


def _copies(seen: ScannedDataset, title: str, groups: Sequence[Group]) -> Section:
    """Two of each group, which lie in different parts or under different labels."""
    pairs = [(group[0], _other(seen, group)) for group in groups]
    places = [place for pair in pairs[: MOST_TILES // 2] for place in pair]
    return Section(title, 2 * len(groups), [_tile(seen, place, _size(seen, place)) for place in places])


def _other(seen: ScannedDataset, group: Group) -> int:
    kind = seen.words(group[0])
    return next((place for place in group if seen.words(place) != kind), group[1])


def _pairs(seen: ScannedDataset, title: str, pairs: Sequence[NearCopy]) -> Section:
    tiles = [
        _tile(seen, place, f"alike {pair.correlation:.4f}, {_size(seen, place)}")
        for pair in pairs[: MOST_TILES // 2]
        for place in (pair.first, pair.second)
    ]
    return Section(title, 2 * len(pairs), tiles)


def _single(seen: ScannedDataset, title: str, places: Iterable[int]) -> Section:
    every = list(places)
    return Section(title, len(every), list(_described(seen, islice(every, MOST_TILES))))


def _described(seen: ScannedDataset, places: Iterable[int]) -> Iterator[Tile]:
    for place in places:
        kind = f"{seen.scan.format_of(place)} {seen.scan.mode_of(place)}, {_size(seen, place)}"
        yield _tile(seen, place, kind)


def _tile(seen: ScannedDataset, place: int, words: str) -> Tile:
    sample = seen.samples[place]
    image = load_thumbnail(seen.dataset.file(sample), CELL)
    return Tile(image, (seen.words(place), words, Path(sample.path).name))


def _size(seen: ScannedDataset, place: int) -> str:
    return f"{seen.scan.rows['width'][place]} x {seen.scan.rows['height'][place]}"
