"""What all plots with matplotlib share: an empty figure, text that is drawn literally, and writing as PNG.

They are drawn with matplotlib's objects, not with pyplot: no global state changes, and no display is needed.
The colours are those of Okabe and Ito, which colour-blind readers can distinguish.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.runs.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000")
"""The palette of Okabe and Ito, without yellow, which is hard to see on white."""
DPI = 150
INK, FAINT, GRID = "#222222", "#666666", "#e4e4e4"


def blank_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Return an empty figure with a light grid; sizes are in inches."""
    figure, [[axes]] = blank_panels(width, height, 1, 1)
    return figure, axes


def blank_panels(width: float, height: float, rows: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    """Return an empty figure with rows of panels, each with a light grid; sizes are in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    panels = [
        [figure.add_subplot(rows, columns, row * columns + column + 1) for column in range(columns)]
        for row in range(rows)
    ]
    for axes in (axes for row in panels for axes in row):
        _style(axes)
    return figure, panels


def _style(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.grid(color=GRID, linewidth=0.8)
    axes.tick_params(length=0, colors=INK, labelsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG, cropped to its content, atomically."""
    buffer = io.BytesIO()
    with without_glyph_warnings():
        figure.savefig(
            buffer, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.15, metadata={"Software": None}
        )
    write_bytes(path, buffer.getvalue())


@contextmanager
def without_glyph_warnings() -> Iterator[None]:
    """Draw characters that the font lacks as boxes, without a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        yield


def to_label(text: str, length: int = 40) -> str:
    """Return text of at most ``length`` characters: an ellipsis replaces the middle of a longer one."""
    half = length // 2 - 1
    return _plain(text if len(text) <= length else f"{text[:half]}…{text[-half:]}")


def wrap(text: str, length: int) -> str:
    """Return text in lines of at most ``length`` characters; its own line breaks stay."""
    return "\n".join(_plain(textwrap.fill(line, length)) for line in text.split("\n"))


def _plain(text: str) -> str:
    """Return text that matplotlib draws literally, without formulas and unprintable characters."""
    printable = "".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in text)
    return printable.replace("$", r"\$")
