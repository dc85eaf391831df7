"""Does the transfer pay? Every strategy beside the same network from random weights.

The strategies are measured by :mod:`benchmarks.strategies`; this question adds the training from random
weights, on the same images and for the same number of epochs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import mean

from benchmarks.accuracy import BACKBONES, Runs, average, collect, describe_backbone, plan_cases, train
from benchmarks.harness import Bench, Case, Question, Turn
from benchmarks.plot import Panels, draw_panels
from benchmarks.results import Figures, Results
from benchmarks.text import bold_best, points, table

SCRATCH = "scratch"
SCRATCH_KEYS = {"strategy.name": SCRATCH, "backbone.weights": None, "training.lr": 0.02}
"""Its learning rate, among 0.02, 0.05, 0.1 and 0.2, was the best on validation images of a draw that is not
judged, with a ResNet-10; the others have the defaults."""
TRANSFER = ("freeze", "top", "full", "auto")


def plan(bench: Bench) -> list[Case]:
    """Return a case for each backbone, data set and number of images."""
    return plan_cases("transfer", (SCRATCH,), bench)


def measure(turn: Turn) -> Figures:
    """Return what training from random weights found."""
    return train(turn, describe_backbone(turn.case, turn.bench) | SCRATCH_KEYS)


def find_rows(results: Results, backbone: str) -> dict[str, Runs]:
    """Return the runs of each case in which every strategy and the random weights have run, seed by seed."""
    transferred = collect(results, f"strategies-{backbone}")
    rows = {}
    for case, runs in collect(results, f"transfer-{backbone}").items():
        every = transferred.get(case, {}) | runs
        if set(every) >= {*TRANSFER, SCRATCH}:
            seeds = min(map(len, every.values()))
            rows[case] = {tool: every[tool][:seeds] for tool in (*TRANSFER, SCRATCH)}
    return rows


def write(results: Results) -> Iterator[str]:
    """Yield a table for each backbone: means and deviations over seeds, in percent."""
    titles = (f"`{tool}`" for tool in (*TRANSFER, SCRATCH))
    head = ["data set, images a class, epochs", "images", "seeds", *titles, "gain"]
    for backbone, name in BACKBONES.items():
        yield f"### {name.partition('/')[2]}\n"
        yield from table(head, (_row(case, runs) for case, runs in find_rows(results, backbone).items()))
        yield ""


def _row(case: str, runs: Runs) -> list[str]:
    cells = {tool: points([run["accuracy"] for run in some]) for tool, some in runs.items()}
    best = bold_best(cells, average(runs))
    number, seeds = average(runs, "num_train")[SCRATCH], len(runs[SCRATCH])
    return [case, f"{number:,.0f}", f"{seeds}", *best.values(), _describe_gain(runs)]


def _describe_gain(runs: Runs) -> str:
    """Return what the strategy that validation prefers has over random weights, seed by seed."""
    judged = average(runs, "val_accuracy")
    chosen = max(TRANSFER, key=lambda tool: judged[tool])
    pairs = zip(runs[chosen], runs[SCRATCH], strict=True)
    return f"{points([run['accuracy'] - scratch['accuracy'] for run, scratch in pairs], '+')} (`{chosen}`)"


def draw(results: Results, path: Path) -> None:
    """Draw accuracy against images, a panel a data set; bars go from the worst to the best seed."""
    panels: Panels = {}
    for case, runs in find_rows(results, "lite0").items():
        for tool, some in runs.items():
            accuracies = [100 * run["accuracy"] for run in some]
            lines = panels.setdefault(case.partition("-")[0], {})
            number = average(runs, "num_train")[SCRATCH]
            lines.setdefault(tool, []).append((number, mean(accuracies), min(accuracies), max(accuracies)))
    draw_panels(panels, ("training images", "accuracy, %"), path)


QUESTION = Question("transfer", plan, measure, write=write, draw=draw)
