"""The sheet of the worst cases: what words cannot show."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL import Image, ImageDraw

from finetune.data.quality.copies import Group
from finetune.data.quality.near import NearCopy
from finetune.data.quality.report import Report
from finetune.data.quality.subject import ScannedDataset
from finetune.preflight.tiles import CELL, FAINT, GAP, INK, LINE, PAPER, draw_tile, font
from finetune.runs.files import write_bytes

LEAST_COLUMNS, COLUMNS = 4, 6
MOST_TILES = 12
"""Of a section: two rows."""
_WORDS = 3
"""Lines under a tile."""


@dataclass(frozen=True)
class Tile:
    """An image and what stands under it."""

    file: Path
    lines: Sequence[str]


@dataclass(frozen=True)
class Section:
    """Images of one kind.

    Attributes:
        title: what they are.
        total: how many there are in all.
        tiles: some of them.
    """

    title: str
    total: int
    tiles: Sequence[Tile]


def write_sections(path: Path, sections: Sequence[Section]) -> bool:
    """Draw sections and write them as PNG; return whether there was anything to draw.

    Raises:
        DiskError: the disk is full, or the folder cannot be written.
    """
    if not sections:
        return False
    buffer = io.BytesIO()
    draw_sections(sections).save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())
    return True


def draw_sections(sections: Sequence[Section]) -> Image.Image:
    """Return a sheet (RGB): a title and rows of tiles for each section."""
    step = CELL + GAP, CELL + _WORDS * LINE + GAP
    columns = min(COLUMNS, max(LEAST_COLUMNS, *(len(section.tiles) for section in sections)))
    heights = [2 * LINE + -(-len(section.tiles) // columns) * step[1] + GAP for section in sections]
    sheet = Image.new("RGB", (GAP + columns * step[0], GAP + sum(heights)), PAPER)
    draw, top = ImageDraw.Draw(sheet), GAP
    for section, height in zip(sections, heights, strict=True):
        draw.text((GAP, top), section.title, INK, font())
        shown = f"{len(section.tiles)} of {section.total} shown" if section.total > len(section.tiles) else ""
        draw.text((sheet.width - GAP, top), shown, FAINT, font(), anchor="ra")
        for place, tile in enumerate(section.tiles):
            corner = GAP + place % columns * step[0], top + 2 * LINE + place // columns * step[1]
            draw_tile(sheet, tile.file, corner, CELL, tile.lines)
        top += height
    return sheet


def find_sections(report: Report) -> list[Section]:
    """Return the worst cases of a report, the gravest kind first."""
    seen, odd = report.seen, report.oddities
    near_leaks, near_conflicts = report.near.leaks(seen), report.near.conflicts(seen)
    plain = [place for place in odd.plain if place not in {*odd.odd, *odd.named}]
    every = [
        _copies(seen, "The same image in two parts", report.copies.leaks),
        _copies(seen, "The same image under two labels", report.copies.conflicts),
        _pairs(seen, "Nearly the same image in two parts (pairs)", near_leaks),
        _pairs(seen, "Nearly the same image under two labels (pairs)", near_conflicts),
        _single(seen, "The same image again and again", [group[0] for group in report.copies.repeated]),
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
        kind = f"{seen.looks.format_of(place)} {seen.looks.mode_of(place)}, {_size(seen, place)}"
        yield _tile(seen, place, kind)


def _tile(seen: ScannedDataset, place: int, words: str) -> Tile:
    sample = seen.samples[place]
    return Tile(seen.dataset.file(sample), (seen.words(place), words, Path(sample.path).name))


def _size(seen: ScannedDataset, place: int) -> str:
    return f"{seen.looks.rows['width'][place]} x {seen.looks.rows['height'][place]}"
