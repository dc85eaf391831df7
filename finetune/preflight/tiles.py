"""Images on square tiles with words under them: what every sheet is made of."""

from __future__ import annotations

import math
import textwrap
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from finetune.data.decode import BadImageError, decode_image

CELL = 176
"""Pixels of a tile's sides."""
GAP = 20
"""Pixels between tiles."""
LINE = 19
"""Pixels of a line of words."""
PAPER, INK, FAINT = "#f5f5f3", "#222222", "#666666"
_TILE = "#e6e6e2"
_TEXT = 13


def draw_tile(
    sheet: Image.Image, file: Path, corner: tuple[int, int], side: int, lines: Sequence[str]
) -> None:
    """Draw an image on a square tile, and lines under it; the last of them is faint."""
    draw, letters = ImageDraw.Draw(sheet), font()
    left, top = corner
    draw.rectangle((left, top, left + side - 1, top + side - 1), fill=_TILE)
    try:
        image = _fitted(decode_image(file, side), side)
        sheet.paste(image, (left + (side - image.width) // 2, top + (side - image.height) // 2))
    except BadImageError as error:
        middle = left + side / 2, top + side / 2
        said = textwrap.fill(error.reason, side // 9)
        draw.text(middle, said, FAINT, letters, anchor="mm", align="center")
    for number, line in enumerate(lines):
        ink = FAINT if number == len(lines) - 1 else INK
        draw.text((left, top + side + 5 + number * LINE), shorten(line, side, letters), ink, letters)


@cache
def font() -> ImageFont.FreeTypeFont:
    """Return matplotlib's font: Pillow's own has no accents."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), _TEXT)


def _fitted(image: Image.Image, side: int) -> Image.Image:
    """Return an image whose longer side has so many pixels; small ones are enlarged."""
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


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
