"""Does the transfer pay? The bundled backbone beside the same network from random weights.

    python -m benchmarks.transfer run --results FILE.jsonl --cache DIR --photographs DIR --tiny DIR
    python -m benchmarks.transfer page --results FILE.jsonl --plot FILE.png

``--tiny`` is the folder that ``python -m benchmarks.tiny_imagenet`` has written. Every strategy of the
lectures' matrix for the same epochs, with 10, 50 and all images a class, and three seeds, each of which draws
other images to learn from. What a run found is one line of the file, and the same command goes on after
what is there; ``--datasets`` lets several processes share the work.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import safetensors.torch
import torch

from benchmarks.strategies_results import append_line
from benchmarks.transfer_data import DATASETS, SIZES, Origin, make_folder
from benchmarks.transfer_page import build_page, draw_plot
from pretrained.catalog import find_card
from pretrained.network import build_network

BACKBONE = "finetune/resnet10t.tin180"
SCRATCH_RATE = 0.02
"""The rate at which random weights did best on validation images of a draw that is not judged (seed 99, among
0.02, 0.05, 0.1 and 0.2; docs/transfer.md). The others have the defaults."""
STRATEGIES: dict[str, dict[str, object]] = {
    "freeze": {"strategy.name": "freeze"},
    "top": {"strategy.name": "top"},
    "full": {"strategy.name": "full"},
    "scratch": {"strategy.name": "scratch", "training.lr": SCRATCH_RATE},
    "random": {"strategy.name": "freeze"},
}
"""Each with its keys of the recipe. ``random`` is a classifier on features that nobody has trained."""
SEEDS = (0, 1, 2)

Key = tuple[str, int, int, str]


@dataclass(frozen=True)
class Trial:
    """What one run found.

    Attributes:
        dataset: a key of ``DATASETS``.
        per_class: images a class to learn from, 0 for all.
        seed: of the images and of the run.
        strategy: a key of ``STRATEGIES``.
        epochs: of training.
        weights: first digits of the backbone's sha256.
        accuracy: on the test part.
        val_accuracy: of the best epoch, on the validation part.
        seconds: of the run.
        num_train: images learned from.
        num_test: images judged on.
    """

    dataset: str
    per_class: int
    seed: int
    strategy: str
    epochs: int
    weights: str
    accuracy: float
    val_accuracy: float
    seconds: float
    num_train: int
    num_test: int

    @property
    def key(self) -> Key:
        """What it is the result of."""
        return self.dataset, self.per_class, self.seed, self.strategy


def read_trials(path: Path) -> dict[Key, Trial]:
    """Return what is in a file of results, and was made as it would be made now."""
    weights = describe_weights()
    trials = {}
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            trial = Trial(**json.loads(line))
        except (ValueError, TypeError):  # the last line of a killed process
            continue
        epochs = DATASETS[trial.dataset].find_epochs(trial.per_class)
        if (trial.epochs, trial.weights) == (epochs, weights):
            trials[trial.key] = trial
    return trials


def append_trial(trial: Trial, path: Path) -> None:
    """Keep a result; processes may share the file."""
    append_line(asdict(trial), path)


def describe_weights() -> str:
    """Return the first digits of the bundled weights' sha256."""
    return find_card(BACKBONE).sha256[:12]


def run_trial(key: Key, origin: Origin, more: Mapping[str, object] | None = None) -> Trial:
    """Run what the command line would run, and read its figures; the run folder is removed."""
    from finetune.job import run
    from finetune.recipe import load_recipe

    name, per_class, seed, strategy = key
    epochs = DATASETS[name].find_epochs(per_class)
    keys = {
        "backbone.name": BACKBONE,
        "data.path": str(make_folder(DATASETS[name], per_class, seed, origin)),
        "data.workers": 0,
        "training.epochs": epochs,
        "seed": seed,
    }
    if strategy == "random":
        keys["backbone.weights"] = str(save_random(seed, origin.cache))
    with tempfile.TemporaryDirectory(dir=origin.cache, prefix="run-") as place:
        began = time.perf_counter()
        recipe = load_recipe(None, keys | STRATEGIES[strategy] | dict(more or {}))
        metrics = run(recipe, Path(place) / "run").metrics
    assert metrics["split"] == "test"
    seconds = round(time.perf_counter() - began, 1)
    figures = (metrics["accuracy"], metrics["val_accuracy"], seconds)
    facts = (metrics["num_train"], metrics["num_samples"])
    return Trial(*key, epochs, describe_weights(), *figures, *facts)


def save_random(seed: int, cache: Path) -> Path:
    """Return the same network's weights as they are before any training."""
    file = cache / f"random-{seed}.safetensors"
    if not file.exists():
        torch.manual_seed(seed)
        state = build_network(find_card(BACKBONE)).state_dict()
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    return file


def plan(datasets: Sequence[str]) -> Iterator[Key]:
    """Yield every run: the quick ones of every seed first."""
    for per_class, seed, name, strategy in product(SIZES, SEEDS, datasets, STRATEGIES):
        yield name, per_class, seed, strategy


def read_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", choices=("run", "page"))
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("transfer-cache"))
    parser.add_argument("--photographs", type=Path, default=Path("hymenoptera"))
    parser.add_argument("--tiny", type=Path, default=Path("tiny"))
    parser.add_argument("--datasets", default=",".join(DATASETS))
    parser.add_argument("--plot", type=Path)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run what is missing, or write the page."""
    arguments = read_arguments(words)
    trials = read_trials(arguments.results)
    if arguments.command == "page":
        sys.stdout.write("\n".join(build_page(list(trials.values()))) + "\n")
        if arguments.plot:
            draw_plot(list(trials.values()), arguments.plot)
        return 0
    cache = arguments.cache.absolute()
    cache.mkdir(parents=True, exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(cache)
    origin = Origin(arguments.photographs, arguments.tiny, cache)
    for key in plan(arguments.datasets.split(",")):
        if key not in trials:
            trial = run_trial(key, origin)
            append_trial(trial, arguments.results)
            sys.stderr.write(f"{key}: {trial.accuracy:.4f}, {trial.seconds:.0f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
