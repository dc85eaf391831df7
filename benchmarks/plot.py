"""Lines with error bars in a grid of panels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555")
"""Of Okabe and Ito: told apart in every kind of colour vision."""
MARKERS = "os^Dx"
Panels = dict[str, dict[str, list[tuple[float, float, float, float]]]]
"""By title and by line: ``(x, middle, low, high)`` of each point."""


def draw_panels(panels: Panels, labels: tuple[str, str], path: Path) -> None:
    """Write a PNG file of all panels, three a row; nothing without any.

    Args:
        panels: what is drawn.
        labels: of the two axes.
        path: the file.
    """
    from matplotlib.figure import Figure

    if not panels:
        return
    rows, columns = -(-len(panels) // 3), min(3, len(panels))
    figure = Figure(figsize=(4 * columns, 3.4 * rows + 0.5), layout="constrained")
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    handles: dict[str, Any] = {}
    for place, (title, lines) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, place, title=title, xlabel=labels[0], ylabel=labels[1])
        for name, points in lines.items():
            x, middle, low, high = zip(*points, strict=True)
            ends = [[m - a for m, a in zip(middle, low, strict=True)]]
            ends += [[b - m for m, b in zip(middle, high, strict=True)]]
            index = names.index(name) % len(COLOURS)
            colour, marker = COLOURS[index], MARKERS[index]
            handles[name] = axes.errorbar(x, middle, yerr=ends, capsize=3, color=colour, marker=marker)
        axes.grid(visible=True, color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(list(handles.values()), names, loc="outside upper center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=120)
