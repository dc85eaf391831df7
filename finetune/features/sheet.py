"""A contact sheet: an image, and beside it those that were found to be like it."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from finetune.preflight.tiles import CELL, GAP, LINE, PAPER, draw_tile
from finetune.runs.files import write_bytes

QUERY = 300
"""Pixels of the query's longer side."""
FEWEST_COLUMNS = 5


@dataclass(frozen=True)
class Hit:
    """An image that was found.

    Attributes:
        file: of the image; its name stands under it.
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
    they are too long. The font has the letters of Europe and the Near East; others come as boxes. An image
    that cannot be read, or no longer, gives way to the reason.

    Args:
        query: file of the image that was asked about.
        hits: in the order of their ranks.
    """
    columns = max(1, min(len(hits), max(FEWEST_COLUMNS, math.isqrt(len(hits)))))
    rows = math.ceil(len(hits) / columns)
    step = CELL + GAP, CELL + 3 * LINE + GAP
    left = QUERY + 3 * GAP if hits else QUERY + 2 * GAP
    size = left + columns * step[0] * bool(hits), GAP + max(QUERY + 2 * LINE + GAP, rows * step[1])
    sheet = Image.new("RGB", size, PAPER)
    draw_tile(sheet, query, (GAP, GAP), QUERY, ["query", query.name])
    for place, hit in enumerate(hits):
        corner = left + place % columns * step[0], GAP + place // columns * step[1]
        lines = [f"{place + 1}.  {hit.similarity:.3f}", hit.label, hit.file.name]
        draw_tile(sheet, hit.file, corner, CELL, lines)
    return sheet
