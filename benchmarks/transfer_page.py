"""The table and the image of :mod:`benchmarks.transfer`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

from benchmarks.transfer_data import DATASETS, SIZES

if TYPE_CHECKING:
    from benchmarks.transfer import Trial

STYLES = {  # colours of Okabe and Ito, told apart in every kind of colour vision; shapes for print
    "freeze": ("#0072B2", "o"),
    "top": ("#009E73", "^"),
    "full": ("#D55E00", "s"),
    "scratch": ("#555555", "x"),
    "random": ("#999999", "+"),
}
TITLES = {
    "freeze": "`freeze`",
    "top": "`top`",
    "full": "`full`",
    "scratch": "`scratch`",
    "random": "`freeze`, random weights",
}
TRANSFER = ("freeze", "top", "full")
Cell = tuple[str, int, str]


def collect(trials: Sequence[Trial]) -> dict[Cell, list[Trial]]:
    """Return the runs of each data set, number of images and strategy."""
    cells: dict[Cell, list[Trial]] = defaultdict(list)
    for trial in trials:
        cells[trial.dataset, trial.per_class, trial.strategy].append(trial)
    return cells


def build_page(trials: Sequence[Trial]) -> list[str]:
    """Return the lines of the table."""
    cells = collect(trials)
    head = [
        "data set",
        "images a class",
        "images",
        "epochs",
        "seeds",
        *(TITLES[name] for name in STYLES),
        "gain",
    ]
    rows = [
        _build_row({name: cells[dataset, per_class, name] for name in STYLES}, dataset, per_class)
        for dataset in DATASETS
        for per_class in SIZES
        if all((dataset, per_class, name) in cells for name in STYLES)
    ]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _build_row(runs: dict[str, list[Trial]], dataset: str, per_class: int) -> list[str]:
    means = {strategy: mean(trial.accuracy for trial in some) for strategy, some in runs.items()}
    some = runs["freeze"]
    row = [
        dataset,
        str(per_class or "all"),
        f"{mean(trial.num_train for trial in some):,.0f}",
        str(some[0].epochs),
        str(min(map(len, runs.values()))),
    ]
    for strategy, found in runs.items():
        mark = "**" if means[strategy] == max(means.values()) else ""
        row.append(f"{mark}{100 * means[strategy]:.1f}{mark} ± {100 * _deviation(found):.1f}")
    return [*row, _describe_gain(runs)]


def _describe_gain(runs: dict[str, list[Trial]]) -> str:
    """Return what the strategy that validation prefers has over random weights, seed by seed."""
    chosen = max(TRANSFER, key=lambda name: mean(trial.val_accuracy for trial in runs[name]))
    scratch = {trial.seed: trial.accuracy for trial in runs["scratch"]}
    gains = [trial.accuracy - scratch[trial.seed] for trial in runs[chosen] if trial.seed in scratch]
    spread = stdev(gains) if len(gains) > 1 else 0.0
    return f"{100 * mean(gains):+.1f} ± {100 * spread:.1f} (`{chosen}`)"


def _deviation(runs: Sequence[Trial]) -> float:
    return stdev(trial.accuracy for trial in runs) if len(runs) > 1 else 0.0


def draw_plot(trials: Sequence[Trial], path: Path) -> None:
    """Draw accuracy against images a class, one panel a data set; bars are one standard deviation."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    cells = collect(trials)
    figure, panels = plt.subplots(1, len(DATASETS), figsize=(3.4 * len(DATASETS), 3.6))
    for axes, name in zip(panels, DATASETS, strict=True):
        places = [per_class for per_class in SIZES if (name, per_class, "freeze") in cells]
        for strategy, (colour, marker) in STYLES.items():
            runs = [cells[name, per_class, strategy] for per_class in places]
            middle = [100 * mean(trial.accuracy for trial in some) for some in runs]
            spread = [100 * _deviation(some) for some in runs]
            keys = {"color": colour, "marker": marker, "markersize": 6, "capsize": 3}
            keys["label"] = TITLES[strategy].replace("`", "")
            axes.errorbar(range(len(places)), middle, yerr=spread, **keys)
        axes.set_xticks(range(len(places)), [str(place or "all") for place in places])
        axes.set_title(name, fontsize=11)
        axes.set_xlabel("images a class")
        axes.grid(visible=True, axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0].set_ylabel("accuracy, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(STYLES), frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)
