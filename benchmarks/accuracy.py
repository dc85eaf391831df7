"""Data sets on which strategies are compared, and the runs on them.

Five real sets of kinds that an ImageNet backbone has not seen (``sets.zip``), and scikit-learn's digits. A
seed draws which images train and validate. The images to judge on are the sets' own ``val`` folders, by which
nothing is chosen; of the digits a seed draws them too.
"""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch
from zlib import crc32

import numpy as np

from benchmarks.data import find_sets, find_weights, make_once
from benchmarks.harness import Bench, Case, Turn
from benchmarks.results import Figures, Results
from finetune.data.samples import open_sample
from finetune.pipeline.run import run
from finetune.recipe import load_recipe

Runs = dict[str, list[Figures]]
"""By strategy, in the order of the seeds."""
EVERY = 0
"""Images a class to learn from: all that there are."""


@dataclass(frozen=True)
class DataSet:
    """A set of images.

    Attributes:
        kind: of images, in a word or two.
        val: images a class that choose the epoch.
        epochs: of training, by images a class to learn from: few images make short epochs.
        test: images a class to judge on, where the set has no part for that.
        augmentation: ``none`` where a flip changes the class.
    """

    kind: str
    val: int
    epochs: Mapping[int, int]
    test: int = 0
    augmentation: str = "light"


DATASETS = {
    "digits": DataSet("handwritten digits", 20, {10: 20, 50: 10}, test=60),
    "wbc4": DataSet("blood cells", 5, {10: 20, EVERY: 10}),
    "coffee5": DataSet("leaf disease", 20, {10: 20, 50: 10, EVERY: 10}),
    "clothing10": DataSet("clothes", 12, {10: 20, EVERY: 10}),
    "grocery22": DataSet("groceries", 6, {10: 20, EVERY: 10}),
    "omniglot136": DataSet("characters", 3, {EVERY: 10}, augmentation="none"),
}


BACKBONES = {"lite0": "timm/tf_efficientnet_lite0", "squeezenet": "torchvision/squeezenet1_0"}
"""Those with ImageNet weights."""
IMG_SIZE = 96
"""128 have 1.8 times the area, and the time went into more data sets and seeds."""


def plan_cases(question: str, strategies: Iterable[str], bench: Bench) -> list[Case]:
    """Return a case for each backbone, data set and number of images.

    The names hold all that the figures depend on.
    """
    sizes = [
        (name, size, epochs) for name, dataset in DATASETS.items() for size, epochs in dataset.epochs.items()
    ]
    return [
        Case(
            f"{question}-{backbone}-{name}-{size or 'all'}-{epochs}",
            tuple(strategies),
            backbone,
            "",
            name,
            size,
            epochs,
        )
        for backbone in (["lite0"] if bench.quick else BACKBONES)
        for name, size, epochs in ([("digits", 10, 1)] if bench.quick else sizes)
    ]


def describe_backbone(case: Case, bench: Bench) -> dict[str, object]:
    """Return the keys of the recipe that say which network a case trains, at which size."""
    keys: dict[str, object] = {"backbone.name": BACKBONES[case.network], "input.img_size": IMG_SIZE}
    if case.network == "squeezenet":
        keys["backbone.weights"] = str(find_weights("squeezenet1_0", bench))
    return keys


def collect(results: Results, question: str) -> dict[str, Runs]:
    """Return the runs of each case by strategy, of those seeds that every strategy in it has finished.

    Args:
        results: the measurements.
        question: beginning of the cases' names: a question and a backbone.
    """
    found: dict[str, dict[str, dict[int, Figures]]] = {}
    for case, tool in results.measured(f"{question}-"):
        runs = {one.repeat: one.figures for one in results.of(case, tool)}
        found.setdefault(case.removeprefix(f"{question}-"), {})[tool] = runs
    seeds = {case: sorted(set.intersection(*map(set, runs.values()))) for case, runs in found.items()}
    return {
        case: {tool: [some[seed] for seed in seeds[case]] for tool, some in runs.items()}
        for case, runs in found.items()
        if seeds[case]
    }


def average(runs: Runs, name: str = "accuracy") -> dict[str, float]:
    """Return the mean of a figure for each strategy."""
    return {tool: mean(run[name] for run in some) for tool, some in runs.items()}


def train(turn: Turn, keys: Mapping[str, object]) -> Figures:
    """Return what a run with these keys of the recipe found, and what it cost."""
    case = turn.case
    given = {
        "data.path": str(make_folder(case.dataset, case.size, turn.repeat, turn.bench)),
        "data.workers": 0,  # decoding processes change no figure, and would take another core
        "input.augmentation": DATASETS[case.dataset].augmentation,
        "training.epochs": case.epochs,
        "seed": turn.repeat,
    }
    began = measure_cpu()
    recipe = load_recipe(None, given | dict(keys))
    with patch("finetune.pipeline.run.add_report"):  # it changes no figure, and takes a third of a short run
        metrics: Mapping[str, Any] = run(recipe, turn.place / "run").metrics
    assert metrics["split"] == "test"
    names = ("accuracy", "val_accuracy", "num_train", "num_classes", "strategy")
    found = {name: metrics[name] for name in names}
    return found | {"num_test": metrics["num_samples"], "cpu": measure_cpu() - began}


def measure_cpu() -> float:
    """Return the processor seconds of this process; other work on the machine stretches them less."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def make_folder(name: str, size: int, seed: int, bench: Bench) -> Path:
    """Return a folder with ``train``, ``val`` and ``test``, made once.

    The images of ``val`` and ``test`` are the same for any number to learn from.
    """
    target = bench.cache / "accuracy" / f"{name}-{size or 'all'}-{seed}"
    return make_once(target, lambda to: _write(name, size, seed, to, bench))


def _write(name: str, size: int, seed: int, target: Path, bench: Bench) -> None:
    dataset, rng = DATASETS[name], np.random.default_rng([seed, crc32(name.encode())])
    source = open_sample("sample:digits") if dataset.test else find_sets(bench) / name / "train"
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        files = sorted(path for path in folder.iterdir() if path.suffix in (".jpg", ".png"))
        drawn = [files[number] for number in rng.permutation(len(files))]
        rest = drawn[dataset.test + dataset.val :]
        own = sorted((source.parent / "val" / folder.name).glob("*")) if not dataset.test else []
        parts = {
            "test": own or drawn[: dataset.test],
            "val": drawn[dataset.test :][: dataset.val],
            "train": rest[:size] if size else rest,
        }
        for part, chosen in parts.items():
            goal = target / part / folder.name
            goal.mkdir(parents=True)
            for path in chosen:
                _link(path, goal / path.name)


def _link(path: Path, target: Path) -> None:
    """A second name costs nothing; another file system takes a copy."""
    try:
        os.link(path.resolve(), target)
    except OSError:
        shutil.copyfile(path, target)
