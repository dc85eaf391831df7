"""Draws seconds against epochs. A script of the peers' environment, which has matplotlib.

python plot.py benchmarks.png < panels.json
"""

from __future__ import annotations

import json
import sys
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

STYLES = {  # colours of Okabe and Ito, told apart in every kind of colour vision; shapes for print
    "finetune": ("#0072B2", "o", 2.6),
    "fastai": ("#D55E00", "s", 1.6),
    "plain": ("#009E73", "^", 1.6),
    "timm": ("#CC79A7", "D", 1.6),
}
TITLES = {
    "squeezenet": "SqueezeNet, 244 photographs, 224 px",
    "resnet18": "ResNet-18, 1,600 images, 64 px",
    "resnet50": "ResNet-50, 1,600 images, 64 px",
}


def draw_panel(axes: Any, panel: dict[str, Any]) -> None:
    """Draw one line a tool; bars go from the fastest to the slowest turn."""
    for line in panel["lines"]:
        colour, marker, width = STYLES[line["tool"]]
        epochs, middle, low, high = zip(*line["points"], strict=True)
        below = [m - x for m, x in zip(middle, low, strict=True)]
        above = [x - m for m, x in zip(middle, high, strict=True)]
        keys = {"color": colour, "marker": marker, "linewidth": width, "markersize": 6, "capsize": 3}
        axes.errorbar(epochs, middle, yerr=[below, above], label=line["tool"], **keys)
    axes.set_title(panel["strategy"], fontsize=11)
    axes.set_xlabel("epochs")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def main() -> None:
    """Draw a row of panels a network."""
    panels = json.load(sys.stdin)
    networks = list(dict.fromkeys(panel["network"] for panel in panels))
    strategies = list(dict.fromkeys(panel["strategy"] for panel in panels))
    size = (4.0 * len(strategies), 3.4 * len(networks) + 0.5)
    figure, grid = plt.subplots(len(networks), len(strategies), figsize=size, squeeze=False)
    for axes in grid.flat:
        axes.set_visible(False)
    for panel in panels:
        column = strategies.index(panel["strategy"])
        axes = grid[networks.index(panel["network"])][column]
        axes.set_visible(True)
        draw_panel(axes, panel)
        if column == 0:
            axes.set_ylabel(f"{TITLES[panel['network']]}\nseconds, whole command", fontsize=9)
    handles = {
        handle.get_label(): handle for axes in grid.flat for handle in axes.get_legend_handles_labels()[0]
    }
    figure.legend(handles.values(), handles.keys(), loc="upper center", ncols=len(handles), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / size[1]))
    figure.savefig(sys.argv[1], dpi=120)


if __name__ == "__main__":
    main()
