"""Curves of how features and probabilities respond to transformed images: a row for each transformation.

After the figure of Zeiler and Fergus (arXiv:1311.2901): at the left the distances of the features by layer,
at the right the probability of the class. Lines are medians over images, bands go from quartile to quartile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from finetune.plots.figure import COLOURS, INK, blank_panels, to_label, wrap, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LAYERS = len(COLOURS)
_BAND = 0.15
"""Opacity of a band."""


@dataclass(frozen=True)
class ResponseRow:
    """How features and probabilities respond to one transformation.

    Attributes:
        label: of the horizontal axis, with the unit.
        amounts: positions on that axis, A of them.
        distances: (L, N, A), of the features of L layers, for N images.
        answers: (N, A), the probability of the class of each image, or its number.
    """

    label: str
    amounts: Sequence[float]
    distances: NDArray[np.float32]
    answers: NDArray[np.float32]


def draw_responses(
    path: Path, layers: Sequence[str], rows: Sequence[ResponseRow], title: str, has_classes: bool = True
) -> None:
    """Draw the responses to transformations, a row of two panels for each.

    Args:
        path: path of the PNG.
        layers: names of the layers, at most :data:`MOST_LAYERS`, in order of depth.
        rows: at least one.
        title: text above the plot.
        has_classes: whether the answers are probabilities, and not numbers.

    Raises:
        DiskError: the disk is full, or the folder cannot be written.
    """
    figure, panels = blank_panels(10.0, 2.9 * len(rows) + 0.6, len(rows), 2)
    figure.subplots_adjust(hspace=0.45, wspace=0.22)
    answer, heading = ("probability", "probability of the class") if has_classes else ("number",) * 2
    for row, (left, right) in zip(rows, panels, strict=True):
        for name, values, colour in zip(layers, row.distances, COLOURS, strict=False):
            _draw_band(left, row.amounts, values, colour, to_label(name))
        _draw_band(right, row.amounts, row.answers, INK, answer)
        left.set(xlabel=row.label, ylabel="relative distance", ylim=(0, None))
        right.set(xlabel=row.label, ylabel=answer, ylim=(-0.02, 1.02) if has_classes else None)
    panels[0][0].set_title("distance of the features", loc="left", fontsize=10)
    panels[0][1].set_title(heading, loc="left", fontsize=10)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(0.06, 0.95), frameon=False, fontsize=8, ncols=7
    )
    figure.suptitle(wrap(title, 110), x=0.07, y=0.97, ha="left", fontsize=11)
    write_figure(path, figure)


def _draw_band(
    axes: Axes, amounts: Sequence[float], values: NDArray[np.float32], colour: str, label: str
) -> None:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75), axis=0)
    axes.fill_between(amounts, low, high, color=colour, alpha=_BAND, linewidth=0)
    axes.plot(amounts, middle, color=colour, linewidth=1.6, marker="o", markersize=2.5, label=label)
