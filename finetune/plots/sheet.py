"""Contact sheets: images on square tiles, with lines of text below each."""

from __future__ import annotations

import io
import math
import textwrap
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from finetune.runs.files import write_bytes

CELL = 176
"""Width and height of a tile in pixels."""
QUERY = 300
"""Width and height of a query's tile in pixels."""
GAP = 20
"""Pixels between tiles."""
LINE = 19
"""Height of a line of text in pixels."""
PAPER = "#f5f5f3"
"""Background of a sheet."""
_INK, _FAINT, _TILE = "#222222", "#666666", "#e6e6e2"
_FONT_SIZE = 13
_LINES = 3
"""Lines of text below a tile."""
_NARROWEST = 3 * (CELL + GAP) + GAP
"""Least width of a grid in pixels, so that its title and notes can be read."""
_FEWEST_HIT_COLUMNS = 5
_FEWEST_COLUMNS, _MOST_COLUMNS = 4, 6


@dataclass(frozen=True)
class Tile:
    """An image and the text below it.

    Attributes:
        image: RGB image whose longer side is that of the tile; or the reason why there is none.
        lines: at most three, in a grid any number; the last one is drawn faint.
    """

    image: Image.Image | str
    lines: Sequence[str]


@dataclass(frozen=True)
class Section:
    """A titled group of tiles.

    Attributes:
        title: what the images have in common.
        total: number of images, shown or not.
        tiles: the tiles that are shown.
    """

    title: str
    total: int
    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Grid:
    """Rows of tiles with a title, headings above the columns and sentences at the foot.

    Attributes:
        title: what the sheet shows.
        rows: tiles, the first at the left; rows may differ in length.
        columns: headings of the columns; empty for none.
        notes: sentences at the foot, such as what a check found; each is broken between words.
        side: width and height of a tile in pixels; the longer side of each image has as many.
    """

    title: str
    rows: Sequence[Sequence[Tile]]
    columns: Sequence[str] = ()
    notes: Sequence[str] = ()
    side: int = CELL


def write_grid(path: Path, grid: Grid) -> None:
    """Draw a grid and write it as PNG, atomically.

    Raises:
        DiskError: the disk is full, or the folder cannot be written.
    """
    _write(path, draw_grid(grid))


def draw_grid(grid: Grid) -> Image.Image:
    """Return a sheet (RGB) with the tiles of a grid."""
    num_columns = max((len(row) for row in grid.rows), default=1)
    num_lines = max((len(tile.lines) for row in grid.rows for tile in row), default=0)
    step = grid.side + GAP, grid.side + num_lines * LINE + GAP
    width = max(GAP + num_columns * step[0], _NARROWEST)
    notes = [line for note in grid.notes for line in wrap_text(note, width - 2 * GAP, load_font())]
    top = GAP + 2 * LINE + bool(grid.columns) * LINE
    height = top + len(grid.rows) * step[1] + bool(notes) * GAP + len(notes) * LINE
    sheet = Image.new("RGB", (width, height), PAPER)
    draw, font = ImageDraw.Draw(sheet), load_font()
    draw.text((GAP, GAP), fit_text(grid.title, width - 2 * GAP, font), _INK, font)
    for number, heading in enumerate(grid.columns):
        draw.text((GAP + number * step[0], top - LINE - 4), fit_text(heading, grid.side, font), _FAINT, font)
    for number, row in enumerate(grid.rows):
        for place, tile in enumerate(row):
            _draw_tile(sheet, tile, (GAP + place * step[0], top + number * step[1]), grid.side)
    for number, line in enumerate(notes):
        draw.text((GAP, height - GAP - (len(notes) - number) * LINE), line, _INK, font)
    return sheet


def write_sections(path: Path, sections: Sequence[Section]) -> bool:
    """Draw sections and write them as PNG, atomically; return whether there was anything to draw.

    Raises:
        DiskError: the disk is full, or the folder cannot be written.
    """
    if sections:
        _write(path, draw_sections(sections))
    return bool(sections)


def draw_sections(sections: Sequence[Section]) -> Image.Image:
    """Return a sheet (RGB): a title and rows of tiles for each section."""
    step = CELL + GAP, CELL + _LINES * LINE + GAP
    columns = min(_MOST_COLUMNS, max(_FEWEST_COLUMNS, *(len(section.tiles) for section in sections)))
    heights = [2 * LINE + -(-len(section.tiles) // columns) * step[1] + GAP for section in sections]
    sheet = Image.new("RGB", (GAP + columns * step[0], GAP + sum(heights)), PAPER)
    draw, top = ImageDraw.Draw(sheet), GAP
    for section, height in zip(sections, heights, strict=True):
        draw.text((GAP, top), section.title, _INK, load_font())
        shown = f"{len(section.tiles)} of {section.total} shown" if section.total > len(section.tiles) else ""
        draw.text((sheet.width - GAP, top), shown, _FAINT, load_font(), anchor="ra")
        for number, tile in enumerate(section.tiles):
            corner = GAP + number % columns * step[0], top + 2 * LINE + number // columns * step[1]
            _draw_tile(sheet, tile, corner, CELL)
        top += height
    return sheet


def write_retrieval(path: Path, query: Tile, hits: Sequence[Tile]) -> None:
    """Draw a query and its hits, and write the sheet as PNG, atomically.

    Raises:
        DiskError: the disk is full, or the folder cannot be written.
    """
    _write(path, draw_retrieval(query, hits))


def draw_retrieval(query: Tile, hits: Sequence[Tile]) -> Image.Image:
    """Return a sheet (RGB): the query at the left, and a grid of hits, the first hit first.

    Args:
        query: tile of the query; the longer side of its image has ``QUERY`` pixels.
        hits: tiles of the hits by rank; the longer sides of their images have ``CELL`` pixels.
    """
    columns = max(1, min(len(hits), max(_FEWEST_HIT_COLUMNS, math.isqrt(len(hits)))))
    rows = math.ceil(len(hits) / columns)
    step = CELL + GAP, CELL + _LINES * LINE + GAP
    left = QUERY + 3 * GAP if hits else QUERY + 2 * GAP
    size = left + columns * step[0] * bool(hits), GAP + max(QUERY + 2 * LINE + GAP, rows * step[1])
    sheet = Image.new("RGB", size, PAPER)
    _draw_tile(sheet, query, (GAP, GAP), QUERY)
    for number, hit in enumerate(hits):
        _draw_tile(sheet, hit, (left + number % columns * step[0], GAP + number // columns * step[1]), CELL)
    return sheet


def _draw_tile(sheet: Image.Image, tile: Tile, corner: tuple[int, int], side: int) -> None:
    draw, font = ImageDraw.Draw(sheet), load_font()
    left, top = corner
    draw.rectangle((left, top, left + side - 1, top + side - 1), fill=_TILE)
    if isinstance(tile.image, str):
        middle = left + side / 2, top + side / 2
        reason = textwrap.fill(tile.image, side // 9)
        draw.text(middle, reason, _FAINT, font, anchor="mm", align="center")
    else:
        width, height = tile.image.size
        sheet.paste(tile.image, (left + (side - width) // 2, top + (side - height) // 2))
    for number, line in enumerate(tile.lines):
        ink = _FAINT if number == len(tile.lines) - 1 else _INK
        draw.text((left, top + side + 5 + number * LINE), fit_text(line, side, font), ink, font)


def _write(path: Path, sheet: Image.Image) -> None:
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


@cache
def load_font() -> ImageFont.FreeTypeFont:
    """Return matplotlib's DejaVu Sans, because Pillow's own font has no accents.

    It covers the scripts of Europe and the Near East; other characters are drawn as boxes.
    """
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), _FONT_SIZE)


def fit_text(text: str, width: float, font: ImageFont.FreeTypeFont) -> str:
    """Return text at most ``width`` pixels wide: three dots replace the middle of a longer one.

    Characters that cannot be printed, line breaks among them, become U+FFFD.
    """
    text = "".join(char if char.isprintable() else "\ufffd" for char in text)
    if font.getlength(text) <= width:
        return text
    lengths = range(1, len(text))  # nearly always, more characters are wider
    longest = bisect_right(lengths, width, key=lambda number: font.getlength(_cut_middle(text, number)))
    return _cut_middle(text, longest)


def wrap_text(text: str, width: float, font: ImageFont.FreeTypeFont) -> list[str]:
    """Return text as lines of at most ``width`` pixels, broken between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [fit_text(line, width, font) for line in lines if line]


def _cut_middle(text: str, keep: int) -> str:
    """Return the first and the last characters of a text, ``keep`` of them in all."""
    return text[: math.ceil(keep / 2)] + "..." + text[len(text) - keep // 2 :]
