"""Plots of features as PNG: accuracy by depth, a map of images, and the matrix of strategies.

Classes have a colour and a marker each (:mod:`finetune.plots.figure`).

Shape legend: N images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

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

MARKERS = ("o", "^", "s")
MOST_CLASSES = 20
"""Largest number of classes for which each has its own colour and marker."""

Curve = tuple[Sequence[float], Sequence[float]]
"""Accuracies in [0, 1] by layer, and their standard deviations."""


def draw_probe(
    path: Path,
    layers: Sequence[str],
    curves: Mapping[str, Curve],
    chance: float,
    title: str,
    metric: str = "accuracy",
) -> None:
    """Draw the score of classifiers on the features of each layer, in order of depth; mark the best.

    Args:
        path: path of the PNG.
        layers: names of the layers in order of depth; at least one.
        curves: one to seven curves by classifier, each with a value for every layer.
        chance: score of a predictor that sees no image.
        title: text above the plot.
        metric: name of the score.

    Raises:
        DiskError: the disk is full, or the folder cannot be written.
    """
    width = max(6.4, 3.2 + 0.55 * len(layers))
    figure, axes = blank_figure(width, 4.4)
    axes.grid(visible=False, axis="x")
    for number, (mean, std) in enumerate(curves.values()):
        positions = [depth + _offset(number, len(curves)) for depth in range(len(layers))]
        style: dict[str, Any] = {"color": COLOURS[number], "marker": "o", "markersize": 5, "linewidth": 1.8}
        axes.errorbar(positions, mean, std, capsize=2.5, elinewidth=1, **style)
    axes.axhline(chance, color=FAINT, linestyle=(0, (5, 4)), linewidth=1.2)
    axes.set_xticks(range(len(layers)), [to_label(layer) for layer in layers])
    if sum(map(len, layers)) > 11 * width - 30:
        for text in axes.get_xticklabels():
            text.set(rotation=40, ha="right", rotation_mode="anchor")
    points = [point for curve in curves.values() for point in zip(*curve, strict=True)]
    lowest = min(chance, *(value - error for value, error in points))
    highest = max(value + error for value, error in points)
    margin = 0.08 * (highest - lowest) + 0.01
    axes.set_ylim(max(min(0.0, lowest), lowest - margin), highest + 1.6 * margin)
    axes.set_xlim(-0.4, len(layers) - 0.6)
    _mark_best(axes, layers, curves)
    ends = {name: mean[-1] for name, (mean, _) in curves.items()}
    _label_ends(axes, [*ends, f"chance {chance:.3g}"], [*ends.values(), chance])
    axes.set(xlabel="layer, from the first to the last", ylabel=f"{metric}, and its standard deviation")
    axes.set_title(wrap(title, 80), loc="left")
    write_figure(path, figure)


def _offset(number: int, count: int) -> float:
    """Return the horizontal shift of a curve's points, so that error bars do not hide each other."""
    return 0.12 * (number / (count - 1) - 0.5) if count > 1 else 0.0


def _mark_best(axes: Axes, layers: Sequence[str], curves: Mapping[str, Curve]) -> None:
    """Draw a ring around the highest point (the first of equal ones), and label it."""
    means = [mean for mean, _ in curves.values()]
    pairs = [(number, depth) for depth in range(len(layers)) for number in range(len(means))]
    number, depth = max(pairs, key=lambda pair: means[pair[0]][pair[1]])
    value, error = means[number][depth], list(curves.values())[number][1][depth]
    x, colour = depth + _offset(number, len(means)), COLOURS[number]
    axes.plot([x], [value], "o", markersize=13, fillstyle="none", color=colour, markeredgewidth=1.6)
    axes.annotate(
        f"best: {to_label(layers[depth])}, {value:.3f}",
        (x, value + error),
        xytext=(0, 7),
        textcoords="offset points",
        ha="right" if depth > 0.7 * len(layers) else "left" if depth < 0.3 * len(layers) else "center",
        va="bottom",
        color=colour,
        fontweight="bold",
    )


def _label_ends(axes: Axes, names: Sequence[str], ends: Sequence[float]) -> None:
    """Write names beside the right ends of lines, moved apart if they would overlap.

    The last name belongs to the line of chance.
    """
    low, high = axes.get_ylim()
    room = (high - low) * 0.06
    colours = [*COLOURS[: len(names) - 1], FAINT]
    order = sorted(zip(ends, names, colours, strict=True))
    heights = [end for end, _, _ in order]
    for _ in range(100):
        for below in range(len(heights) - 1):
            lacking = max(0.0, room - (heights[below + 1] - heights[below]))
            heights[below] -= lacking / 2
            heights[below + 1] += lacking / 2
    for height, (_, name, colour) in zip(heights, order, strict=True):
        axes.annotate(
            to_label(name),
            (1, height),
            xytext=(8, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            color=colour,
            annotation_clip=False,
        )


def draw_map(
    path: Path,
    points: NDArray[np.floating],
    labels: Sequence[int],
    classes: Sequence[str],
    title: str,
    names: tuple[str, str],
    shares: tuple[float, float] | None = None,
) -> None:
    """Draw images as points, coloured by class.

    Up to 20 classes have a colour and a marker each, and a legend. More are coloured by their index, which
    the title says. The name of a class stands at the median of its points, where there is room.

    Args:
        path: path of the PNG.
        points: (N, 2), coordinates of the images.
        labels: N class indices.
        classes: class names in index order.
        title: text above the plot.
        names: names of the two axes.
        shares: share of the variance along each axis, in [0, 1]; None for axes without a unit, which get no
            ticks.

    Raises:
        DiskError: the disk is full, or the folder cannot be written.
    """
    figure, axes = blank_figure(8.6, 6.0)
    points, indices = points.astype(np.float64), np.asarray(labels)
    axes.set_aspect("equal", adjustable="datalim")
    size = min(36.0, max(5.0, 30_000 / max(1, len(points))))
    if len(classes) <= MOST_CLASSES:
        _draw_classes(axes, points, indices, classes, size)
    else:
        title += f"\n{len(classes)} classes, coloured by their index"
        _draw_many_classes(axes, points, indices, len(classes), size)
    _name_classes(axes, points, indices, classes)
    axis_labels = [to_label(name) for name in names]
    if shares is None:
        axes.set_xticks([])
        axes.set_yticks([])
    else:
        axis_labels = [
            f"{name} ({share:.1%} of the variance)" for name, share in zip(axis_labels, shares, strict=True)
        ]
    axes.set(xlabel=axis_labels[0], ylabel=axis_labels[1])
    axes.set_title(wrap(title, 80), loc="left")
    write_figure(path, figure)


def _draw_classes(axes: Axes, points: Any, labels: Any, classes: Sequence[str], size: float) -> None:
    """Draw points (N, 2) class by class, with a legend beside them."""
    handles = []
    for index in range(len(classes)):
        own = points[labels == index]
        marker = MARKERS[index // len(COLOURS)]
        style: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "marker": marker, "linewidths": 0}
        axes.scatter(own[:, 0], own[:, 1], s=size, alpha=0.65, **style)
        handles.append(axes.scatter([], [], s=40, **style))
    axes.legend(
        handles,
        [to_label(name) for name in classes],
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        frameon=False,
        borderaxespad=0,
        handletextpad=0.3,
    )


def _draw_many_classes(axes: Axes, points: Any, labels: Any, num_classes: int, size: float) -> None:
    """Draw points (N, 2) coloured by class index, with a colour bar beside them."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colours = ScalarMappable(Normalize(0, num_classes - 1), "viridis")
    axes.scatter(points[:, 0], points[:, 1], s=size, c=colours.to_rgba(labels), alpha=0.65, linewidths=0)
    scale = axes.figure.colorbar(colours, ax=axes, pad=0.02, fraction=0.04, label="class index")
    scale.outline.set_visible(False)


def _name_classes(axes: Axes, points: Any, labels: Any, classes: Sequence[str]) -> None:
    """Write the name of each class at the median of its points, unless it would overlap another name."""
    from matplotlib.patheffects import withStroke

    axes.apply_aspect()  # as drawing does; from here on the extents of texts are final
    taken: list[Any] = []
    for index, name in enumerate(classes):
        own = points[labels == index]
        if not len(own):
            continue
        x, y = np.median(own, axis=0)
        halo = [withStroke(linewidth=2.5, foreground="white")]
        shown = to_label(name, 16)
        text = axes.text(x, y, shown, ha="center", va="center", fontsize=8.5, color=INK, path_effects=halo)
        with without_glyph_warnings():
            box = text.get_window_extent()
        if any(box.overlaps(other) for other in taken):
            text.remove()
        else:
            taken.append(box)


def draw_strategy_matrix(
    path: Path, cells: Mapping[tuple[str, str], str], marked: tuple[str, str], title: str
) -> None:
    """Draw the matrix of strategies by amount of data and similarity, and mark one cell.

    Args:
        path: path of the PNG.
        cells: text by (amount of data, similarity); a row for each amount, a column for each similarity,
            in order of first appearance.
        marked: a key of ``cells``: the cell of the user's data.
        title: text above the plot.

    Raises:
        DiskError: the disk is full, or the folder cannot be written.
    """
    rows, columns = (
        list(dict.fromkeys(row for row, _ in cells)),
        list(dict.fromkeys(column for _, column in cells)),
    )
    figure, axes = blank_figure(1.6 + 2.9 * len(columns), 1.5 + 1.25 * len(rows))
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
    for (row, column), text in cells.items():
        _draw_cell(axes, columns.index(column), rows.index(row), text, (row, column) == marked)
    axes.set_xlim(-0.02, len(columns) + 0.02)
    axes.set_ylim(len(rows) + 0.02, -0.02)
    axes.set_xticks(
        [number + 0.5 for number in range(len(columns))], [to_label(name, 28) for name in columns]
    )
    axes.set_yticks([number + 0.5 for number in range(len(rows))], [to_label(name, 28) for name in rows])
    axes.tick_params(length=0, labelsize=11, top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("similarity to what the backbone was trained on", labelpad=9, color=FAINT)
    axes.set_ylabel("amount of data", labelpad=9, color=FAINT)
    axes.set_title(wrap(title, 25 + 25 * len(columns)), loc="left", pad=16)
    write_figure(path, figure)


def _draw_cell(axes: Axes, column: int, row: int, text: str, marked: bool) -> None:
    from matplotlib.patches import FancyBboxPatch

    box = FancyBboxPatch(
        (column + 0.03, row + 0.05),
        0.94,
        0.9,
        boxstyle="round,pad=0,rounding_size=0.04",
        facecolor="#0072B2" if marked else "#f3f3f1",
        edgecolor="none",
    )
    axes.add_patch(box)
    lines = wrap(text, 30)
    axes.text(
        column + 0.5,
        row + 0.5,
        lines,
        ha="center",
        va="center",
        linespacing=1.35,
        fontsize=min(10.5, 52 / (1 + lines.count("\n"))),
        fontweight="bold" if marked else "normal",
        color="white" if marked else INK,
    )
