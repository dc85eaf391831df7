"""Bubble charts of networks: accuracy against a cost, with the number of parameters as the area."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.plots.figure import (
    COLOURS,
    FAINT,
    INK,
    blank_figure,
    to_label,
    without_glyph_warnings,
    wrap,
    write_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LARGEST = 1600.0
"""Area of the largest bubble in square points."""
_WIDE = 20
"""Positions whose ratio is larger are drawn on a logarithmic axis."""
_SIDES = ((0, 1), (1, 0), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
"""Directions in which a name may stand beside its bubble, the best first."""


@dataclass(frozen=True)
class Bubble:
    """A network of the chart.

    Attributes:
        name: written beside the bubble.
        position: on the horizontal axis, over 0.
        accuracy: on the vertical axis, in percent.
        parameters: number of parameters, the area.
    """

    name: str
    position: float
    accuracy: float
    parameters: int


def draw_bubbles(path: Path, bubbles: Sequence[Bubble], labels: tuple[str, str], title: str) -> None:
    """Draw a bubble for each network.

    Args:
        path: path of the PNG.
        bubbles: at least one.
        labels: of the horizontal and the vertical axis.
        title: text above the plot.

    Raises:
        DiskError: the disk is full, or the folder cannot be written.
    """
    figure, axes = blank_figure(8.6, 5.6)
    positions = [bubble.position for bubble in bubbles]
    if max(positions) > _WIDE * min(positions):
        _use_logarithms(axes)
    largest = max(bubble.parameters for bubble in bubbles)
    areas = [_LARGEST * bubble.parameters / largest for bubble in bubbles]
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(bubbles))]
    heights = [bubble.accuracy for bubble in bubbles]
    axes.scatter(positions, heights, s=areas, c=colours, alpha=0.45, linewidths=0)
    axes.scatter(positions, heights, s=6, c=colours, linewidths=0)
    axes.margins(0.14)
    axes.set(xlabel=labels[0], ylabel=wrap(labels[1], 60))
    axes.set_title(wrap(title, 80), loc="left")
    _draw_key(axes, largest)
    _write_names(axes, bubbles, areas)
    write_figure(path, figure)


def _use_logarithms(axes: Axes) -> None:
    """Make the horizontal axis logarithmic, with the numbers 1, 2 and 5 of each power of ten, written out."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _draw_key(axes: Axes, largest: int) -> None:
    """Draw beside the plot how large a bubble is for round numbers of parameters."""
    top = 10 ** math.floor(math.log10(largest))
    sizes = [size for size in (top // 10, top // 2, top, top * 5) if 0 < size <= 1.01 * largest]
    marks = [axes.scatter([], [], s=_LARGEST * size / largest, color=FAINT, alpha=0.45) for size in sizes]
    axes.legend(
        marks,
        [_count(size) for size in sizes],
        title="parameters",
        loc="upper left",
        bbox_to_anchor=(1.02, 1.0),
        frameon=False,
        labelspacing=2.6,
        handletextpad=1.4,
        borderpad=1.2,
    )


def _count(size: int) -> str:
    for unit, name in ((10**9, " billion"), (10**6, " million"), (10**3, ",000")):
        if size >= unit:
            return f"{size / unit:g}{name}"
    return str(size)


def _write_names(axes: Axes, bubbles: Sequence[Bubble], areas: Sequence[float]) -> None:
    """Write each name beside its bubble, on the first side where it covers the least.

    Another name, a centre and the edge of the plot count twice, another bubble once.
    """
    from matplotlib.transforms import Bbox

    axes.figure.canvas.draw_idle()
    centres = [axes.transData.transform((bubble.position, bubble.accuracy)) for bubble in bubbles]
    radii = [math.sqrt(area / math.pi) for area in areas]
    reach = [radius * axes.figure.dpi / 72 for radius in radii]
    discs = [Bbox([centre - far, centre + far]) for centre, far in zip(centres, reach, strict=True)]
    taken: list[Any] = []
    for number, (bubble, radius) in enumerate(zip(bubbles, radii, strict=True)):
        texts: list[tuple[int, int, Any, Any]] = []
        for right, up in _SIDES:
            text = _write(axes, bubble, radius + 3, right, up)
            with without_glyph_warnings():
                box = text.get_window_extent()
            names = sum(box.overlaps(other) for other in taken)
            dots = sum(bool(box.contains(x, y)) for x, y in centres)
            is_outside = not (axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1)
            others = sum(box.overlaps(disc) for disc in discs[:number] + discs[number + 1 :])
            covered = 2 * (names + dots + is_outside) + others
            texts.append((covered, len(texts), text, box))
        best = min(texts, key=lambda entry: entry[:2])
        taken.append(best[3])
        for entry in texts:
            if entry is not best:
                entry[2].remove()


def _write(axes: Axes, bubble: Bubble, distance: float, right: int, up: int) -> Any:
    return axes.annotate(
        to_label(bubble.name, 32),
        (bubble.position, bubble.accuracy),
        xytext=(right * distance, up * distance),
        textcoords="offset points",
        ha={-1: "right", 0: "center", 1: "left"}[right],
        va={-1: "top", 0: "center", 1: "bottom"}[up],
        fontsize=8.5,
        color=INK,
    )
