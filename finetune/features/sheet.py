"""A contact sheet: a picture, and beside it those that were found to be like it."""

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

from finetune.data.decode import BadImageError, decode_image
from finetune.runs.files import write_bytes

CELL = 176
"""Pixels of a found picture's longer side."""
QUERY = 300
"""Pixels of the query's longer side."""
FEWEST_COLUMNS = 5
_GAP = 20
_LINE = 19
_TEXT = 13
_PAPER, _TILE, _INK, _FAINT = "#f5f5f3", "#e6e6e2", "#222222", "#666666"


@dataclass(frozen=True)
class Hit:
    """A picture that was found.

    Attributes:
        file: of the picture; its name stands under it.
        similarity: to the query, -1 to 1.
        label: its class.
    """

    file: Path
    similarity: float
    label: str


def write_sheet(path: Path, query: Path, hits: Sequence[Hit]) -> None:
    """Draw a sheet and write it as PNG, whole or not at all.

    Raises:
        DiskError: the disk is full, or the folder cannot be written.
    """
    buffer = io.BytesIO()
    draw_sheet(query, hits).save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def draw_sheet(query: Path, hits: Sequence[Hit]) -> Image.Image:
    """Return a sheet (RGB): the query on the left, and a grid of what was found, the first hit first.

    Under each stand its rank and similarity, its label and its file's name, shortened in the middle where
    they are too long. The font has the letters of Europe and the Near East; others come as boxes. A picture
    that cannot be read, or no longer, gives way to the reason.

    Args:
        query: file of the picture that was asked about.
        hits: in the order of their ranks.
    """
    columns = max(1, min(len(hits), max(FEWEST_COLUMNS, math.isqrt(len(hits)))))
    rows = math.ceil(len(hits) / columns)
    step = CELL + _GAP, CELL + 3 * _LINE + _GAP
    left = QUERY + 3 * _GAP if hits else QUERY + 2 * _GAP
    size = left + columns * step[0] * bool(hits), _GAP + max(QUERY + 2 * _LINE + _GAP, rows * step[1])
    sheet = Image.new("RGB", size, _PAPER)
    _draw_cell(sheet, query, (_GAP, _GAP), QUERY, ["query", query.name])
    for place, hit in enumerate(hits):
        corner = left + place % columns * step[0], _GAP + place // columns * step[1]
        lines = [f"{place + 1}.  {hit.similarity:.3f}", hit.label, hit.file.name]
        _draw_cell(sheet, hit.file, corner, CELL, lines)
    return sheet


def _draw_cell(sheet: Image.Image, file: Path, corner: tuple[int, int], side: int, lines: list[str]) -> None:
    """Draw a picture on a square tile, and lines under it; the last of them is faint."""
    draw, font = ImageDraw.Draw(sheet), _font()
    left, top = corner
    draw.rectangle((left, top, left + side - 1, top + side - 1), fill=_TILE)
    try:
        picture = _fitted(decode_image(file, side), side)
        sheet.paste(picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2))
    except BadImageError as error:
        middle = left + side / 2, top + side / 2
        said = textwrap.fill(error.reason, side // 9)
        draw.text(middle, said, _FAINT, font, anchor="mm", align="center")
    for number, line in enumerate(lines):
        ink = _FAINT if number == len(lines) - 1 else _INK
        draw.text((left, top + side + 5 + number * _LINE), shorten(line, side, font), ink, font)


@cache
def _font() -> ImageFont.FreeTypeFont:
    """Return matplotlib's font: Pillow's own has no accents."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), _TEXT)


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    """Return a picture whose longer side has so many pixels; small ones are enlarged."""
    scale = side / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def shorten(text: str, width: float, font: ImageFont.FreeTypeFont) -> str:
    """Return text that is at most ``width`` pixels wide: its middle gives way to three dots.

    What cannot be seen, a line break among it, becomes a replacement character.
    """
    text = "".join(char if char.isprintable() else "\ufffd" for char in text)
    if font.getlength(text) <= width:
        return text
    keep = range(1, len(text))  # more characters are hardly ever narrower
    longest = bisect_right(keep, width, key=lambda number: font.getlength(_without_middle(text, number)))
    return _without_middle(text, longest)


def _without_middle(text: str, keep: int) -> str:
    """Return the first and the last characters of a text, ``keep`` of them in all."""
    return text[: math.ceil(keep / 2)] + "..." + text[len(text) - keep // 2 :]
