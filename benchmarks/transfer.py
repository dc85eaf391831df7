"""Does the transfer pay? The bundled backbone beside the same network from random weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from benchmarks.accuracy import Runs, average, collect, plan_cases, train
from benchmarks.data import make_once
from benchmarks.harness import Bench, Case, Question, Turn
from benchmarks.plot import Panels, draw_panels
from benchmarks.results import Figures, Results
from benchmarks.text import bold_best, points, table
from pretrained.catalog import find_card
from pretrained.network import build_network

BACKBONE = "finetune/resnet10t.tin180"
SCRATCH_LR = 0.02
"""At which random weights did best on validation images of a draw that is not judged (among 0.02, 0.05, 0.1
and 0.2; docs/transfer.md). The others have the defaults."""
STRATEGIES: dict[str, dict[str, object]] = {
    "freeze": {"strategy.name": "freeze"},
    "top": {"strategy.name": "top"},
    "full": {"strategy.name": "full"},
    "scratch": {"strategy.name": "scratch", "training.lr": SCRATCH_LR},
    "random": {"strategy.name": "freeze"},
}
"""Each with its keys of the recipe. ``random`` is a classifier on features that nobody has trained."""
TITLES = {name: f"`{name}`" for name in STRATEGIES} | {"random": "`freeze`, random weights"}
TRANSFER = ("freeze", "top", "full")


def plan(bench: Bench) -> list[Case]:
    """Return a case for each data set and number of images."""
    return plan_cases("transfer", STRATEGIES, bench)


def measure(turn: Turn) -> Figures:
    """Return what a strategy found."""
    keys = {"backbone.name": BACKBONE} | STRATEGIES[turn.tool]
    if turn.tool == "random":
        keys["backbone.weights"] = str(find_random(turn.repeat, turn.bench))
    return train(turn, keys)


def find_random(seed: int, bench: Bench) -> Path:
    """Return the weights of the same network before any training."""
    return make_once(bench.cache / f"transfer-random-{seed}.safetensors", lambda to: _save_random(seed, to))


def _save_random(seed: int, target: Path) -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    state = build_network(find_card(BACKBONE)).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, target)


def find_rows(results: Results) -> dict[str, Runs]:
    """Return the runs of each case in which every strategy has run."""
    return {case: runs for case, runs in collect(results, "transfer").items() if set(runs) == set(STRATEGIES)}


def write(results: Results) -> Iterable[str]:
    """Return the table: means and deviations over seeds, in percent."""
    head = ["data set, images a class, epochs", "images", "seeds", *TITLES.values(), "gain"]
    return table(head, (_row(case, runs) for case, runs in find_rows(results).items()))


def _row(case: str, runs: Runs) -> list[str]:
    cells = {tool: points([run["accuracy"] for run in some]) for tool, some in runs.items()}
    best = bold_best(cells, average(runs))
    number, seeds = average(runs, "num_train")["freeze"], len(runs["freeze"])
    return [case, f"{number:,.0f}", f"{seeds}", *(best[tool] for tool in TITLES), _describe_gain(runs)]


def _describe_gain(runs: Runs) -> str:
    """Return what the strategy that validation prefers has over random weights, seed by seed."""
    judged = average(runs, "val_accuracy")
    chosen = max(TRANSFER, key=lambda tool: judged[tool])
    pairs = zip(runs[chosen], runs["scratch"], strict=True)
    return f"{points([run['accuracy'] - scratch['accuracy'] for run, scratch in pairs], '+')} (`{chosen}`)"


def draw(results: Results, path: Path) -> None:
    """Draw accuracy against images, a panel a data set; bars go from the worst to the best seed."""
    panels: Panels = {}
    for case, runs in find_rows(results).items():
        number = average(runs, "num_train")["freeze"]
        for tool, some in runs.items():
            accuracies = [100 * run["accuracy"] for run in some]
            lines = panels.setdefault(case.partition("-")[0], {})
            point = (number, mean(accuracies), min(accuracies), max(accuracies))
            lines.setdefault(TITLES[tool].replace("`", ""), []).append(point)
    draw_panels(panels, ("training images", "accuracy, %"), path)


QUESTION = Question("transfer", plan, measure, write=write, draw=draw)
