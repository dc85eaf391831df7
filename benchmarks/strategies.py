"""How well ``--strategy auto`` chooses, on data sets of different size and likeness to ImageNet.

    python -m benchmarks.strategies run --results FILE.jsonl --cache DIR [--strategies freeze,top,full,auto]
    python -m benchmarks.strategies page --results FILE.jsonl

Each run is the command line in a process of its own, with an empty cache. What it found is one line of the
file, so the same command goes on after what is there, wherever it was stopped. All strategies of a data set
learn from the same images, for the same epochs, and are judged on a test part by which nothing was chosen.

SqueezeNet 1.0 at 96 pixels: 128 have 1.8 times the area, and the time went into more data sets and seeds.
Numbers of images and of epochs are in ``benchmarks/strategies_data.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.data import SQUEEZENET
from benchmarks.machine import ROOT
from benchmarks.strategies_data import DATASETS, DataSet, make_folder
from benchmarks.strategies_results import (
    IMG_SIZE,
    STRATEGIES,
    Key,
    Trial,
    append_trial,
    build_page,
    collect_rows,
    describe_setup,
    read_trials,
)


class RunFailedError(Exception):
    """The command line ended with an error; the text is its last words."""


@dataclass(frozen=True)
class Bench:
    """Where everything lies.

    Attributes:
        results: the file of results.
        cache: folder for images, and for what runs leave until they have been read.
        shared: folder with the originals and the weights.
    """

    results: Path
    cache: Path
    shared: Path

    def build_words(self, dataset: DataSet, seed: int, strategy: str, output: Path) -> list[str]:
        """Return the command line of a run."""
        data = make_folder(dataset, seed, self.cache, self.shared)
        words = [sys.executable, "-m", "finetune", "run", "--backbone", "squeezenet1_0"]
        words += ["--weights", str(self.shared / SQUEEZENET), "--data", str(data), *STRATEGIES[strategy]]
        words += ["--img-size", str(IMG_SIZE), "--epochs", str(dataset.epochs), "--seed", str(seed)]
        # No decoding processes: they change no figure, and would take another core.
        return [*words, "--workers", "0", "--output", str(output), "--json", "--offline"]

    def run(self, dataset: DataSet, seed: int, strategy: str) -> Trial:
        """Return what a run found; its folder is removed.

        Raises:
            RunFailedError: the command ended with an error.
        """
        with tempfile.TemporaryDirectory(dir=self.cache, prefix="run-") as place:
            output = Path(place) / "out"
            words = self.build_words(dataset, seed, strategy, output)
            cpu, began = measure_cpu(), time.perf_counter()
            run_command(words, Path(place) / "cache")
            seconds, cpu = time.perf_counter() - began, measure_cpu() - cpu
            found = read_run(output) | {"seconds": round(seconds, 1), "cpu": round(cpu, 1)}
        return Trial(dataset.name, seed, strategy, describe_setup(dataset), **found)


def measure_cpu() -> float:
    """Return the processor seconds of all processes that were started from here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run_command(words: Sequence[str], cache: Path) -> None:
    """Run a command line of this very checkout, with a cache of its own.

    Raises:
        RunFailedError: it ended with an error.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)}
    said = subprocess.run(  # noqa: S603 - words of our own
        words, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if said.returncode:
        last = " / ".join(said.stderr.strip().splitlines()[-5:])
        raise RunFailedError(f"exit status {said.returncode}: {last}")


def read_run(folder: Path) -> dict[str, Any]:
    """Return the figures of a run, and what it decided."""
    from ruamel.yaml import YAML

    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    recipe = YAML(typ="safe", pure=True).load(folder / "recipe.yaml")
    found = {name: metrics[name] for name in ("accuracy", "val_accuracy", "num_train", "num_classes")}
    return found | {
        "num_test": metrics["num_samples"],
        "chosen": metrics["strategy"],
        "decided": dict(recipe["strategy"]),
    }


def plan_runs(names: Iterable[str], strategies: Iterable[str], seeds: Iterable[int]) -> Iterator[Key]:
    """Yield every run: all data sets with the first seed, then all with the next."""
    for seed, name, strategy in product(seeds, names, strategies):
        yield name, seed, strategy


def run_all(bench: Bench, keys: Iterable[Key]) -> int:
    """Run what is not in the file yet; return how many runs failed."""
    bench.cache.mkdir(parents=True, exist_ok=True)
    datasets = {dataset.name: dataset for dataset in DATASETS}
    done, failed = read_trials(bench.results), 0
    for name, seed, strategy in keys:
        if (name, seed, strategy) in done:
            continue
        try:
            trial = bench.run(datasets[name], seed, strategy)
        except RunFailedError as error:
            failed += 1
            say(f"{name} seed {seed} {strategy}: {error}")
            continue
        append_trial(trial, bench.results)
        say(f"{name} seed {seed} {strategy}: {trial.accuracy:.4f}, {trial.cpu:.0f} of {trial.seconds:.0f} s")
    return failed


def say(line: str) -> None:
    """Show a line to whoever waits."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")


def pick_names(given: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return names that may be parted by commas; all known ones of none.

    Raises:
        ValueError: a name is not known.
    """
    names = list(known)
    chosen = [name for word in given for name in word.split(",") if name]
    for name in chosen:
        if name not in names:
            raise ValueError(f"{name} is not known; there are {', '.join(names)}")
    return chosen or names


def read_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.strategies", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", choices=("run", "page"))
    parser.add_argument("--results", type=Path, required=True, help="file of results")
    parser.add_argument("--cache", type=Path, help="folder for images; beside the results by default")
    parser.add_argument(
        "--shared", type=Path, default=ROOT.parent / "shared" / "data", help="originals, weights"
    )
    parser.add_argument("--only", nargs="+", default=[], help="names of data sets; all by default")
    parser.add_argument("--strategies", default="freeze,top,full,auto", help=f"of {', '.join(STRATEGIES)}")
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args(words)
    options.cache = options.cache or options.results.with_suffix("")
    try:
        options.only = pick_names(options.only, (dataset.name for dataset in DATASETS))
        options.strategies = pick_names([options.strategies], STRATEGIES)
        options.seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError as error:
        parser.error(str(error))
    return options


def main() -> int:
    """Carry out the command."""
    options = read_arguments()
    if options.command == "page":
        sys.stdout.write("\n".join(build_page(collect_rows(read_trials(options.results)))) + "\n")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what a run has left is removed
    bench = Bench(options.results.absolute(), options.cache.absolute(), options.shared.absolute())
    return 1 if run_all(bench, plan_runs(options.only, options.strategies, options.seeds)) else 0


if __name__ == "__main__":
    sys.exit(main())
