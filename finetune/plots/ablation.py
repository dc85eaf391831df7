"""The error of a network without each of its blocks, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.plots.figure import COLOURS, FAINT, INK, blank_figure, to_label, wrap, write_figure

_ROW = 0.25
"""Height of a row in inches."""


@dataclass(frozen=True)
class AblationRow:
    """What removing a block changes.

    Attributes:
        name: the block.
        increase: of the error, as a fraction.
        interval: its 95 % interval.
        is_claimed: whether the error changes significantly; it is then drawn in colour.
    """

    name: str
    increase: float
    interval: tuple[float, float]
    is_claimed: bool


def draw_ablation(
    path: Path,
    rows: Sequence[AblationRow],
    error: float,
    title: str,
    label: str = "error",
    is_share: bool = True,
) -> None:
    """Draw the error without each block.

    Args:
        path: path of the PNG.
        rows: in the order of execution, the first at the top; at least one.
        error: of the complete network, as a fraction.
        title: text above the plot.
        label: what the error is.
        is_share: whether no error is larger than 1; intervals end there.

    Raises:
        DiskError: the disk is full, or the folder cannot be written.
    """
    figure, axes = blank_figure(8.0, 1.1 + _ROW * len(rows))
    axes.grid(visible=False, axis="y")
    for place, row in enumerate(rows):
        value, colour = 100 * (error + row.increase), COLOURS[3] if row.is_claimed else FAINT
        ends = [100 * min(max(error + end, 0.0), 1.0 if is_share else math.inf) for end in row.interval]
        axes.plot(ends, [place, place], color=colour, linewidth=2, solid_capstyle="round")
        axes.plot([value], [place], "o", color=colour, markersize=5)
    axes.axvline(100 * error, color=INK, linestyle=(0, (5, 4)), linewidth=1.2)
    axes.annotate(
        f"complete network: {100 * error:.1f} %",
        (100 * error, 0),
        xytext=(5, 4),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        fontsize=9,
    )
    axes.set_yticks(range(len(rows)), [to_label(row.name) for row in rows])
    axes.set_ylim(len(rows) + 0.3, -0.7)
    axes.set(xlabel=f"{label} without the block in percent, and its 95 % interval (grey: no change claimed)")
    axes.set_title(wrap(title, 90), loc="left", fontsize=11)
    write_figure(path, figure)
