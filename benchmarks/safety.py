"""What the promises of docs/faults.md cost in training time.

    python -m benchmarks.safety --data ../shared/data/hymenoptera

Every part of the trainer that a bare loop does not have is timed where it runs, on a CPU, where nothing is
asynchronous; the share is of the whole time spent in ``Trainer.fit`` without validation. Machines are noisy,
but numerator and denominator come from the same seconds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from finetune.job import run
from finetune.recipe import load_recipe
from finetune.system.heartbeat import Heartbeat
from finetune.training.checkpoint import CheckpointStore
from finetune.training.state import State
from finetune.training.step import KeptBuffers
from finetune.training.trainer import Trainer

PARTS: dict[str, list[tuple[type, str]]] = {
    "copies of running statistics": [(KeptBuffers, "keep")],
    "finite checks": [(Trainer, "_is_usable"), (State, "is_finite")],
    "copies of the state, an epoch": [(State, "take"), (State, "take_judged")],
    "checkpoints": [(CheckpointStore, "save")],
    "signs of life": [(Heartbeat, "beat")],
}
CASES = (
    ("resnet18", 16),
    ("vit_tiny_patch16_224", 16),
    ("mobilenetv3_small_050", 16),
    ("mobilenetv3_small_050", 4),
)


class Stopwatch:
    """Seconds by name; calls inside of a timed call count for the outer one."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._running = False

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the call, with its seconds added to a name."""

        def timed(*arguments: Any, **keys: Any) -> Any:
            if self._running:
                return call(*arguments, **keys)
            self._running, began = True, time.perf_counter()
            try:
                return call(*arguments, **keys)
            finally:
                self.seconds[name] += time.perf_counter() - began
                self._running = False

        return timed


@contextmanager
def timed_parts() -> Iterator[Stopwatch]:
    """Time every part while the block runs."""
    watch = Stopwatch()
    with ExitStack() as stack:
        for name, methods in PARTS.items():
            for owner, method in methods:
                timed = watch.wrap(name, getattr(owner, method))
                stack.enter_context(mock.patch.object(owner, method, timed))
        yield watch


def measure(backbone: str, batch_size: int, data: Path, epochs: int) -> dict[str, float]:
    """Return the share of each part in the training time, and that time."""
    recipe = load_recipe(
        None,
        {
            "backbone.name": backbone,
            "strategy.name": "scratch",  # everything learns: the largest checkpoints, and no weights needed
            "data.path": str(data),
            "training.epochs": epochs,
            "training.batch_size": batch_size,
            "data.workers": 1,
        },
    )
    with tempfile.TemporaryDirectory() as folder, timed_parts() as watch:
        finished = run(recipe, Path(folder) / "run")
        history = (finished.folder.history).read_text().splitlines()
    column = history[0].split(",").index("seconds")
    total = sum(float(line.split(",")[column]) for line in history[1:])
    total += watch.seconds["checkpoints"] + watch.seconds["copies of the state, an epoch"]
    return {name: watch.seconds[name] / total for name in PARTS} | {"seconds": total}


def main() -> None:
    """Print one row a case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()
    sys.stdout.write(f"| case | {' | '.join(PARTS)} | together | training |\n")
    for backbone, batch_size in CASES:
        shares = measure(backbone, batch_size, options.data, options.epochs)
        cells = [f"{shares[name]:.2%}" for name in PARTS]
        together = sum(shares[name] for name in PARTS)
        row = [f"{backbone}, batches of {batch_size}", *cells, f"{together:.2%}"]
        sys.stdout.write(f"| {' | '.join(row)} | {shares['seconds']:.0f} s |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
