"""Tell trackers of a run, and let none of them hurt it.

A tracker that fails is warned of once and dropped: the run, its files and its bits are the same with and
without. What a tracker was told is noted in ``tracking/trackers.json``, so that a run that goes on tells each
epoch once, to the tracker's same run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from finetune.errors import EnvironmentFaultError, InterruptedRunError
from finetune.recipe import Recipe, TrackerName
from finetune.runs.files import write_json
from finetune.runs.folder import RunFolder
from finetune.system.display import Display
from finetune.tracking.tracker import End, Tracker, describe_run, flatten_metrics

CLIENTS: dict[TrackerName, str] = {
    "tensorboard": "finetune.tracking.tensorboard.TensorBoard",
    "wandb": "finetune.tracking.weights_and_biases.WeightsAndBiases",
    "mlflow": "finetune.tracking.mlflow.MLflow",
}
"""Imported where they are asked for, since each needs a package of its own."""


@dataclass
class TrackerState:
    """What a tracker knows.

    Attributes:
        run_id: its own name for the run.
        epoch: the last one that it was told, from 1.
    """

    run_id: str = ""
    epoch: int = 0


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Make sure that the clients are there, before anything starts.

    Raises:
        EnvironmentFaultError: one is not installed or cannot be loaded; names the extra to install.
    """
    for name in names:
        try:
            _find_client(name)
        except Exception as error:  # a client that is installed may be broken in any way
            fix = f'Run `pip install "finetune[{name}]"`, or leave it out of tracking.to.'
            found = f"its client cannot be loaded ({type(error).__name__}: {error})"
            raise EnvironmentFaultError(f"tracking.to={name}", found, fix) from None


def _find_client(name: TrackerName) -> Any:
    module, _, client = CLIENTS[name].rpartition(".")
    return getattr(import_module(module), client)


class Trackers:
    """The trackers of one attempt at a run; none at all where the recipe names none.

    Args:
        recipe: resolved.
        folder: of the run.
        display: where a tracker that fails is warned of.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, display: Display) -> None:
        self._recipe, self._folder, self._display = recipe, folder, display
        self._open: dict[TrackerName, Tracker] = {}
        self._told: dict[str, TrackerState] = {}

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Keep the trackers open while the block runs, and tell them how it ended."""
        end: End = "failed"
        self._begin()
        try:
            yield
            end = "done"
        except InterruptedRunError:
            end = "interrupted"
            raise
        finally:
            for name, tracker in list(self._open.items()):
                with self._guarded(name):
                    tracker.close(end)

    def log_epochs(self, history: Sequence[Mapping[str, float]]) -> None:
        """Tell the rows of a history that were not told before."""
        for name, tracker in list(self._open.items()):
            with self._guarded(name):
                told = self._told[name]
                new = [row for row in history if row["epoch"] > told.epoch]
                for row in new:
                    tracker.log_epoch(row)
                    told.epoch = int(row["epoch"])
                if new:
                    self._note()

    def log_final(self, metrics: Mapping[str, Any]) -> None:
        """Tell the numbers of ``metrics.json``."""
        for name, tracker in list(self._open.items()):
            with self._guarded(name):
                tracker.log_final(flatten_metrics(metrics), metrics["epochs"])

    def _begin(self) -> None:
        names = dict.fromkeys(self._recipe.tracking.to)
        if not names:
            return
        subject = describe_run(self._recipe, self._folder.path)
        self._told = self._read()
        for name in names:
            with self._guarded(name):
                told = self._told.setdefault(name, TrackerState())
                subject.home.mkdir(exist_ok=True)
                self._open[name] = _find_client(name)(subject, told.run_id)
                told.run_id = self._open[name].run_id
                self._note()
        if self._open:
            self._display.note(f"tracking: {', '.join(self._open)}, in {subject.home}")

    @contextmanager
    def _guarded(self, name: TrackerName) -> Iterator[None]:
        """Drop a tracker that fails, with one warning."""
        try:
            yield
        except Exception as error:  # a disk that is full, a server that is gone, a bug of theirs
            self._open.pop(name, None)
            said = " ".join(str(error).split())[:200]
            reason = f"{type(error).__name__}: {said}" if said else type(error).__name__
            self._display.warn(f"{name} cannot be told of the run any more ({reason}); it goes on without")

    @property
    def _notes(self) -> Path:
        return self._folder.tracking / "trackers.json"

    def _note(self) -> None:
        write_json(self._notes, {name: asdict(told) for name, told in self._told.items()})

    def _read(self) -> dict[str, TrackerState]:
        """Return what an earlier attempt noted; nothing where that is damaged."""
        try:
            content = json.loads(self._notes.read_text(encoding="utf-8"))
            return {
                str(n): TrackerState(str(told["run_id"]), int(told["epoch"])) for n, told in content.items()
            }
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return {}
