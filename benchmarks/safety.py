"""What the promises of docs/faults.md cost in training time.

Every part of the trainer that a bare loop does not have is timed where it runs, on a CPU, where nothing is
asynchronous; the share is of the whole time spent in ``Trainer.fit`` without validation. Machines are noisy,
but numerator and denominator come from the same seconds.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from benchmarks.data import NETWORKS, find_folder
from benchmarks.harness import Bench, Case, Question, Turn
from benchmarks.results import Figures
from finetune.pipeline.run import run
from finetune.recipe import load_recipe
from finetune.system.heartbeat import Heartbeat
from finetune.training.checkpoint import CheckpointStore
from finetune.training.state import State
from finetune.training.step import BufferBackup
from finetune.training.trainer import Trainer

PARTS: dict[str, list[tuple[type, str]]] = {
    "copies of running statistics": [(BufferBackup, "keep")],
    "finite checks": [(Trainer, "_is_usable"), (State, "is_finite")],
    "copies of the state, an epoch": [(State, "take"), (State, "take_eval_weights")],
    "checkpoints": [(CheckpointStore, "save")],
    "heartbeat": [(Heartbeat, "beat")],
}
CASES = (
    Case("safety-resnet18-16", network="resnet18", size=16, epochs=4),
    Case("safety-vit_tiny_patch16_224-16", network="vit_tiny_patch16_224", size=16, epochs=4),
    Case("safety-mobilenetv3_small_050-16", network="mobilenetv3_small_050", size=16, epochs=4),
    Case("safety-mobilenetv3_small_050-4", network="mobilenetv3_small_050", size=4, epochs=4),
)


def plan(bench: Bench) -> list[Case]:
    """Return a case for each backbone and batch size."""
    return [Case(CASES[-1].name, network=CASES[-1].network, size=4)] if bench.quick else list(CASES)


@contextmanager
def timed_parts() -> Iterator[dict[str, float]]:
    """Add up the seconds of every part while the block runs; calls inside of a timed call count for it."""
    seconds, running = dict.fromkeys(PARTS, 0.0), [False]

    def wrap(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **keys: Any) -> Any:
            if running[0]:
                return call(*arguments, **keys)
            running[0], began = True, time.perf_counter()
            try:
                return call(*arguments, **keys)
            finally:
                seconds[name] += time.perf_counter() - began
                running[0] = False

        return timed

    with ExitStack() as stack:
        for name, methods in PARTS.items():
            for owner, method in methods:
                timed = wrap(name, getattr(owner, method))
                stack.enter_context(mock.patch.object(owner, method, timed))
        yield seconds


def measure(turn: Turn) -> Figures:
    """Return the share of each part in the training time, and that time."""
    recipe = load_recipe(
        None,
        {
            "backbone.name": turn.case.network,
            "strategy.name": "scratch",  # everything learns: the largest checkpoints, and no weights needed
            "data.path": str(find_folder(NETWORKS["squeezenet"], turn.bench)),
            "training.epochs": turn.case.epochs,
            "training.batch_size": turn.case.size,
            "data.workers": 1,
        },
    )
    with timed_parts() as seconds:
        finished = run(recipe, turn.place / "run")
    with finished.folder.history.open(encoding="utf-8", newline="") as file:
        total = sum(float(row["seconds"]) for row in csv.DictReader(file))
    total += seconds["checkpoints"] + seconds["copies of the state, an epoch"]
    shares = {name: 100 * seconds[name] / total for name in PARTS}
    return shares | {"together": sum(shares.values()), "seconds": total}


QUESTION = Question(
    "safety",
    plan,
    measure,
    {f"{name}, %": name for name in (*PARTS, "together")} | {"training, s": "seconds"},
)
