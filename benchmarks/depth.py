"""The degradation of depth (arXiv:1512.03385, figure 6): do deeper networks learn worse, if plain?

CIFAR networks of 20 and 56 layers, plain and residual, on a part of CIFAR-10: the same seeds, images and
number of epochs, with the recipe ``cifar-resnet`` but for batches of 64 and one epoch of warm-up. The images
are a tenth of the paper's, and the steps a fortieth, so that curves and ranks can be compared, and errors
cannot.
Every epoch is evaluated on the test images, and no epoch is chosen by them: the last one counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

from benchmarks.accuracy import Runs, collect, measure_cpu
from benchmarks.data import find_cifar_curves
from benchmarks.harness import Bench, Case, Question, Turn
from benchmarks.plot import Panels, draw_panels
from benchmarks.results import Figures, Results
from benchmarks.text import points, table
from finetune.pipeline.run import run
from finetune.recipe import load_recipe

TOOLS = ("cifar_plain20", "cifar_plain56", "cifar_resnet20", "cifar_resnet56")
IMAGES, EPOCHS, BATCH = 500, 20, 64
"""Training images a class, of 5,000; epochs; images a step."""


def plan(bench: Bench) -> list[Case]:
    """Return the case; its name holds all that the figures depend on."""
    images, epochs = (6, 2) if bench.quick else (IMAGES, EPOCHS)
    tools = TOOLS[:2] if bench.quick else TOOLS
    return [Case(f"depth-{images}-{epochs}", tools, size=images, epochs=epochs)]


def make_recipe(turn: Turn) -> dict[str, object]:
    """Return the keys that differ from the shipped recipe."""
    epochs = turn.case.epochs
    return {
        "backbone.name": turn.tool,
        "data.path": str(find_cifar_curves(turn.case.size, turn.bench)),
        "data.workers": 0,
        "training.epochs": epochs,
        "training.batch_size": BATCH,
        "training.warmup_epochs": 1.0,
        "seed": turn.repeat,
    }


def measure(turn: Turn) -> Figures:
    """Return the curves of a training: the loss on training images, and the accuracy on test images."""
    began = measure_cpu()
    folder = turn.place / "run"
    run(load_recipe("cifar-resnet", make_recipe(turn)), folder)
    rows = read_history(folder)
    curves = {"train_loss": "train_loss", "test_accuracy": "eval_accuracy"}
    found: Figures = {name: [row[column] for row in rows] for name, column in curves.items()}
    return found | {"cpu": measure_cpu() - began}


def read_history(folder: Path) -> list[dict[str, float]]:
    """Return the rows of a run's ``history.csv``."""
    head, *rows = (folder / "history.csv").read_text("utf-8").splitlines()
    return [dict(zip(head.split(","), map(float, row.split(",")), strict=True)) for row in rows]


def write(results: Results) -> Iterator[str]:
    """Yield a table: how each network ends, and what 36 layers more change."""
    head = ["images a class, epochs", "network", "seeds", "training loss at the end"]
    head += ["test accuracy at the end", "processor seconds"]
    rows: list[list[str]] = []
    for case, runs in collect(results, "depth").items():
        rows += [[case, tool.removeprefix("cifar_"), *_cells(some)] for tool, some in runs.items()]
    yield from table(head, rows)
    for runs in collect(results, "depth").values():
        yield from ("", *(_compare(runs, kind) for kind in ("plain", "resnet") if f"cifar_{kind}56" in runs))


def _cells(some: list[Figures]) -> list[str]:
    loss, seconds = mean(one["train_loss"][-1] for one in some), mean(one["cpu"] for one in some)
    accuracy = points([one["test_accuracy"][-1] for one in some])
    return [f"{len(some)}", f"{loss:.3f}", accuracy, f"{seconds:,.0f}"]


def _compare(runs: Runs, kind: str) -> str:
    """Return what the deeper network has more than the other one, seed by seed."""
    pairs = list(zip(runs[f"cifar_{kind}20"], runs[f"cifar_{kind}56"], strict=True))
    losses = [deep["train_loss"][-1] - shallow["train_loss"][-1] for shallow, deep in pairs]
    gains = [deep["test_accuracy"][-1] - shallow["test_accuracy"][-1] for shallow, deep in pairs]
    found = f"training loss {mean(losses):+.3f}, test accuracy {points(gains, '+')} points"
    return f"- {kind}, 56 layers instead of 20: {found}"


def draw(results: Results, path: Path) -> None:
    """Draw both curves, a line a network; bars go from the lowest to the highest seed."""
    panels: Panels = {}
    for runs in collect(results, "depth").values():
        for tool, some in runs.items():
            for name, title in (("train_loss", "training loss"), ("test_accuracy", "test error, %")):
                curves = zip(*(one[name] for one in some), strict=True)
                lines = panels.setdefault(title, {})
                lines[tool.removeprefix("cifar_")] = [
                    _point(epoch, values, name) for epoch, values in enumerate(curves, start=1)
                ]
    draw_panels(panels, ("epoch", ""), path)


def _point(epoch: int, values: tuple[float, ...], name: str) -> tuple[float, float, float, float]:
    shown = [100 * (1 - value) if name == "test_accuracy" else value for value in values]
    assert all(map(math.isfinite, shown))
    return epoch, mean(shown), min(shown), max(shown)


QUESTION = Question("depth", plan, measure, write=write, draw=draw)
