"""Pretrain on S, transfer to T: a network of the zoo that learnt five classes learns the other five.

CIFAR ResNet-20 is trained from random weights on five classes of CIFAR-10 with the recipe ``cifar-resnet``.
Its run is the backbone of ``freeze``, ``top`` and ``full`` on the other five classes, of which there are few
images. ``scratch`` has the same images and epochs, and random weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.accuracy import average, collect, measure_cpu
from benchmarks.data import find_cifar, make_once
from benchmarks.harness import Bench, Case, Question, Turn
from benchmarks.results import Figures, Results
from benchmarks.text import bold_best, points, table
from finetune.pipeline.run import run
from finetune.recipe import load_recipe

SOURCE = ("airplane", "bird", "deer", "frog", "ship")
TARGET = ("automobile", "cat", "dog", "horse", "truck")
STRATEGIES: dict[str, dict[str, object]] = {
    "freeze": {"strategy.name": "freeze"},
    "top": {"strategy.name": "top"},
    "full": {"strategy.name": "full"},
    "scratch": {"strategy.name": "scratch", "training.lr": 0.1},
}
BACKBONE = "cifar_resnet20"
IMAGES, EPOCHS = 1000, 30
"""Training images a class, and epochs, of the source."""


def plan(bench: Bench) -> list[Case]:
    """Return a case for each number of images a class of the target."""
    sizes = {4: 1} if bench.quick else {10: 40, 50: 20, 250: 10}
    return [
        Case(f"source-{size}-{epochs}", tuple(STRATEGIES), size=size, epochs=epochs)
        for size, epochs in sizes.items()
    ]


def measure(turn: Turn) -> Figures:
    """Return what a strategy found on the target, and what it cost."""
    given = {
        "backbone.name": BACKBONE if turn.tool == "scratch" else str(find_source(turn)),
        "data.path": str(find_cifar(turn.case.size, turn.bench, TARGET)),
        "data.workers": 0,
        "input.augmentation": "shift",
        "training.epochs": turn.case.epochs,
        "seed": turn.repeat,
    }
    began = measure_cpu()
    metrics = run(load_recipe(None, given | STRATEGIES[turn.tool]), turn.place / "run").metrics
    assert metrics["split"] == "test"
    return {"accuracy": metrics["accuracy"], "cpu": measure_cpu() - began}


def find_source(turn: Turn) -> Path:
    """Return the run on the source, made once for each seed."""
    images, epochs = (6, 1) if turn.bench.quick else (IMAGES, EPOCHS)
    given: dict[str, object] = {
        "backbone.name": BACKBONE,
        "data.path": str(find_cifar(images, turn.bench, SOURCE)),
        "data.workers": 0,
        "training.epochs": epochs,
        "seed": turn.repeat,
    }

    def train(to: Path) -> None:
        run(load_recipe("cifar-resnet", given), to)

    name = f"{BACKBONE}-{images}-{epochs}-{turn.repeat}"
    return make_once(turn.bench.cache / "source" / name, train)


def write(results: Results) -> Iterator[str]:
    """Yield a row for each number of images: means and deviations over seeds, in percent."""
    head = ["images a class, epochs", "seeds", *(f"`{name}`" for name in STRATEGIES), "processor seconds"]
    rows = []
    for case, runs in collect(results, "source").items():
        cells = {tool: points([one["accuracy"] for one in some]) for tool, some in runs.items()}
        seconds = ", ".join(f"{value:.0f}" for value in average(runs, "cpu").values())
        seeds = len(next(iter(runs.values())))
        rows.append([case, f"{seeds}", *bold_best(cells, average(runs)).values(), seconds])
    yield from table(head, rows)


QUESTION = Question("source", plan, measure, write=write)
