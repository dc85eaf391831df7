"""What our loop costs over a bare one: the same batches from memory, step by step in turns, in one process.

    python -m benchmarks.overhead --arch resnet18 --img-size 64 --batch-size 32 --data ./images

A run of ours trains everything. Its loader is made to hand out batches that were loaded before. Between two
of its steps a copy of its network makes the same step bare: forward, backward, SGD. Everything our loop
does between one batch and the next counts as ours: checks for numbers that are none, checkpoints, progress.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn.functional import cross_entropy

from benchmarks.limits import read_arguments
from finetune.data.loader import Batch, ImageLoader
from finetune.job import run
from finetune.recipe import load_recipe
from finetune.training.trainer import Trainer

BATCHES = 8
"""Different batches that are kept in memory; each is handed out several times an epoch."""


class Bare:
    """A copy of the network with a loop of three lines around it."""

    def __init__(self, trainer: Trainer) -> None:
        self.network = copy.deepcopy(trainer.task.network)
        names = {id(weight): name for name, weight in trainer.task.network.named_parameters()}
        mine = dict(self.network.named_parameters())
        groups = [
            {
                "params": [mine[names[id(weight)]] for weight in group["params"]],
                "lr": group["lr"],
                "weight_decay": group["weight_decay"],
            }
            for group in trainer.optimizer.param_groups
        ]
        self.optimizer = torch.optim.SGD(groups, momentum=0.9)
        self.half = trainer.precision == "bfloat16"
        self.gradient_seconds = self.step_seconds = 0.0

    def step(self, batch: Batch) -> None:
        """Learn from a batch, timed."""
        began = now()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=self.half):
            loss = cross_entropy(self.network(batch.images), batch.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        middle = now()
        self.optimizer.step()
        self.gradient_seconds += middle - began
        self.step_seconds += now() - middle


def now() -> float:
    """Return the time, with the GPU's work done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Turns:
    """Hands out batches from memory, and makes a bare step after each of the trainer's.

    Args:
        steps: batches an epoch.
        warm: steps at the beginning that do not count.
    """

    def __init__(self, steps: int, warm: int) -> None:
        self.steps, self.warm = steps, warm
        self.bare: Bare | None = None
        self.kept: list[Batch] = []
        self.ours_seconds, self.images = 0.0, 0

    def patched(self, original: Callable[..., Iterator[Batch]]) -> Callable[..., Iterator[Batch]]:
        """Return what stands in for ``ImageLoader.batches``: only training gets batches from memory."""

        def batches(
            loader: ImageLoader, epoch: int = 0, start: int = 0, stop: int | None = None
        ) -> Iterator[Batch]:
            if self.bare is None or stop is not None or not loader.shuffle:
                yield from original(loader, epoch, start, stop)
                return
            loader.wait_seconds = 0.0
            if not self.kept:
                whole = (batch for batch in original(loader, epoch) if len(batch.labels) == loader.batch_size)
                self.kept = [batch for batch, _ in zip(whole, range(BATCHES), strict=False)]
            yield from self._take_turns()

        return batches

    def _take_turns(self) -> Iterator[Batch]:
        assert self.bare is not None
        for number in range(self.steps):
            batch = self.kept[number % len(self.kept)]
            began = now()
            yield batch
            ours = now() - began
            self.bare.step(batch)
            if self.warm:
                self.warm -= 1
                self.bare.gradient_seconds = self.bare.step_seconds = 0.0
                continue
            self.ours_seconds += ours
            self.images += len(batch.labels)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return seconds of both loops over the same steps, and their ratios."""
    recipe = load_recipe(
        None,
        {
            "backbone.name": f"torchvision/{options.arch}",
            "backbone.weights": str(options.weights),
            "data.path": str(options.data),
            "data.workers": 1,
            "input.img_size": options.img_size,
            "strategy.name": "full",
            "training.epochs": 1 if options.quick else 2,
            "training.batch_size": options.batch_size,
        },
    )
    turns = Turns(steps=10 if options.quick else 40, warm=3)
    fit = Trainer.fit

    def fit_beside_bare(trainer: Trainer) -> Any:
        turns.bare = Bare(trainer)
        return fit(trainer)

    with (
        mock.patch.object(ImageLoader, "batches", turns.patched(ImageLoader.batches)),
        mock.patch.object(Trainer, "fit", fit_beside_bare),
    ):
        run(recipe, folder / "run")
    bare = turns.bare
    assert bare is not None and turns.images > 0
    both = bare.gradient_seconds + bare.step_seconds
    return {
        "ours_seconds": turns.ours_seconds,
        "gradient_seconds": bare.gradient_seconds,
        "step_seconds": bare.step_seconds,
        "over_loop": turns.ours_seconds / both - 1,
        "over_gradient": turns.ours_seconds / bare.gradient_seconds - 1,
        "images_per_second": turns.images / turns.ours_seconds,
        "bare_images_per_second": turns.images / both,
    }


def main() -> None:
    """Measure, and print one line."""
    options = read_arguments()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options, Path(folder))
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
