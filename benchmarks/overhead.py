"""What our loop costs over a bare one: the same batches from memory, step by step in turns, in one process.

A run of ours trains everything. Its loader is made to hand out batches that were loaded before. Between two
of its steps a copy of its network makes the same step bare: forward, backward, the optimiser. Everything our
loop does between one batch and the next counts as ours: checks for non-finite values, checkpoints, progress.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any
from unittest import mock

import torch
from torch.nn.functional import cross_entropy

from benchmarks.data import find_network, find_recipe, list_networks
from benchmarks.harness import Bench, Case, Question, Turn
from benchmarks.limits import BARE
from benchmarks.results import Figures
from finetune.data.loader import Batch, ImageLoader
from finetune.pipeline.run import run
from finetune.recipe import load_recipe
from finetune.training.trainer import Trainer

BATCHES = 8
"""Different batches that are kept in memory; each is handed out several times an epoch."""
WARM_STEPS = 3
"""Steps at the beginning that do not count."""


def plan(bench: Bench) -> list[Case]:
    """Return a case for each network."""
    names = [name for name in list_networks(bench) if name != "resnet50"]
    return [Case(f"overhead-{name}", (BARE,), name) for name in [*names, *["resnet50-gpu"] * bench.cuda]]


class Turns:
    """Hands out batches from memory, and makes a bare step after each of the trainer's.

    Args:
        trainer: before its first step.
        steps: batches an epoch.
    """

    def __init__(self, trainer: Trainer, steps: int) -> None:
        self.network, self.optimizer = copy.deepcopy((trainer.task.network, trainer.phase.optimizer))
        self.half, self.steps, self.warm = trainer.precision == "bfloat16", steps, WARM_STEPS
        self.kept: list[Batch] = []
        self.ours = self.gradient = self.step = 0.0
        self.images = 0

    def take(self, loaded: Iterator[Batch], batch_size: int) -> Iterator[Batch]:
        """Yield the batches of an epoch, which are loaded at its first time only."""
        whole = (batch for batch in loaded if len(batch.labels) == batch_size)
        self.kept = self.kept or list(islice(whole, BATCHES))
        for number in range(self.steps):
            batch = self.kept[number % len(self.kept)]
            began = now()
            yield batch
            ours = now() - began
            gradient, step = self.step_bare(batch)
            if self.warm:
                self.warm -= 1
                continue
            self.ours, self.gradient, self.step = self.ours + ours, self.gradient + gradient, self.step + step
            self.images += len(batch.labels)

    def step_bare(self, batch: Batch) -> tuple[float, float]:
        """Learn from a batch; return the seconds of forward and backward, and those of the optimiser."""
        began = now()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=self.half):
            loss = cross_entropy(self.network(batch.images), batch.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        middle = now()
        self.optimizer.step()
        return middle - began, now() - middle


def now() -> float:
    """Return the time, with the GPU's work done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(turn: Turn) -> Figures:
    """Return what our steps cost over the bare ones, and images a second of both."""
    recipe = find_recipe(find_network(turn.case.network, turn.bench), turn.bench)
    recipe |= {"strategy.name": "full", "training.epochs": 1 if turn.bench.quick else 2}
    steps, fit, batches = 2 * WARM_STEPS if turn.bench.quick else 40, Trainer.fit, ImageLoader.batches
    turns: list[Turns] = []

    def fit_beside_bare(trainer: Trainer) -> Any:
        turns.append(Turns(trainer, steps))
        return fit(trainer)

    def batches_from_memory(loader: ImageLoader, *words: Any, **keys: Any) -> Iterator[Batch]:
        loaded = batches(loader, *words, **keys)
        # Only training shuffles, and begins its epochs at the first batch.
        return turns[0].take(loaded, loader.batch_size) if turns and loader.shuffle else loaded

    with (
        mock.patch.object(ImageLoader, "batches", batches_from_memory),
        mock.patch.object(Trainer, "fit", fit_beside_bare),
    ):
        run(load_recipe(None, recipe), turn.place / "run")
    found = turns[0]
    return {
        "over_loop": 100 * (found.ours / (found.gradient + found.step) - 1),
        "over_gradient": 100 * (found.ours / found.gradient - 1),
        "images_per_second": found.images / found.ours,
        "bare_images_per_second": found.images / (found.gradient + found.step),
    }


COLUMNS = {
    "bare, images/s": "bare_images_per_second",
    "ours, images/s": "images_per_second",
    "over the bare loop, %": "over_loop",
    "over forward and backward, %": "over_gradient",
}
QUESTION = Question("overhead", plan, measure, COLUMNS)
