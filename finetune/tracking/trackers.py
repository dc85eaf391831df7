"""Log a run to experiment trackers, without risk for the run.

A tracker that fails causes one warning and is dropped: the run and its results are the same with and without
trackers. ``tracking/trackers.json`` records what each tracker has got, so that a resumed run logs each epoch
once, to the same run of the tracker.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from finetune.errors import EnvironmentFaultError, InterruptedRunError
from finetune.recipe import Recipe, TrackerName
from finetune.runs.files import read_object, write_json
from finetune.runs.folder import RunFolder
from finetune.system.display import Display
from finetune.tracking.tracker import End, Tracker, describe_run, flatten_metrics

CLIENTS: dict[TrackerName, str] = {
    "tensorboard": "finetune.tracking.tensorboard.TensorBoard",
    "wandb": "finetune.tracking.weights_and_biases.WeightsAndBiases",
    "mlflow": "finetune.tracking.mlflow.MLflow",
}
"""Class of each tracker's client, imported only if it is used: each needs its own package."""
_PACKAGES: dict[TrackerName, str] = {"mlflow": "mlflow-skinny"}
"""Names of packages that differ from the tracker's."""


@dataclass
class TrackerState:
    """What a tracker has got so far.

    Attributes:
        run_id: the tracker's id of the run.
        epoch: the last epoch that was logged, from 1; 0 before the first.
    """

    run_id: str = ""
    epoch: int = 0


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Check before the run starts that the clients of the trackers can be imported.

    Raises:
        EnvironmentFaultError: a client is not installed or cannot be imported; names the package to install.
    """
    for name in names:
        try:
            _find_client(name)
        except Exception as error:  # an installed client may fail in any way
            fix = f"Run `pip install {_PACKAGES.get(name, name)}`, or leave it out of tracking.to."
            found = f"its client cannot be loaded ({type(error).__name__}: {error})"
            raise EnvironmentFaultError(f"tracking.to={name}", found, fix) from None


def _find_client(name: TrackerName) -> Any:
    module, _, client = CLIENTS[name].rpartition(".")
    return getattr(import_module(module), client)


class Trackers:
    """The trackers of one attempt at a run; does nothing if the recipe names none.

    Args:
        recipe: resolved recipe.
        folder: run folder.
        display: shows the warning about a tracker that fails.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, display: Display) -> None:
        self._recipe, self._folder, self._display = recipe, folder, display
        self._open: dict[TrackerName, Tracker] = {}
        self._states: dict[str, TrackerState] = {}

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Keep the trackers open while the block runs, and let them record how it ended."""
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
        """Log the rows of a history that were not logged before."""
        for name, tracker in list(self._open.items()):
            with self._guarded(name):
                state = self._states[name]
                new = [row for row in history if row["epoch"] > state.epoch]
                for row in new:
                    tracker.log_epoch(row)
                    state.epoch = int(row["epoch"])
                if new:
                    self._write_states()

    def log_final(self, metrics: Mapping[str, Any]) -> None:
        """Log the numbers of ``metrics.json``."""
        for name, tracker in list(self._open.items()):
            with self._guarded(name):
                tracker.log_final(flatten_metrics(metrics), metrics["epochs"])

    def _begin(self) -> None:
        names = dict.fromkeys(self._recipe.tracking.to)
        if not names:
            return
        run_info = describe_run(self._recipe, self._folder.path)
        self._states = self._read_states()
        for name in names:
            with self._guarded(name):
                state = self._states.setdefault(name, TrackerState())
                run_info.home.mkdir(exist_ok=True)
                self._open[name] = _find_client(name)(run_info, state.run_id)
                state.run_id = self._open[name].run_id
                self._write_states()
        if self._open:
            self._display.note(f"tracking: {', '.join(self._open)}, in {run_info.home}")

    @contextmanager
    def _guarded(self, name: TrackerName) -> Iterator[None]:
        """Drop a tracker that fails in the block, with one warning."""
        try:
            yield
        except Exception as error:  # a full disk, a server that is gone, a bug of the client
            self._open.pop(name, None)
            message = " ".join(str(error).split())[:200]
            reason = f"{type(error).__name__}: {message}" if message else type(error).__name__
            self._display.warn(f"{name} failed and is switched off ({reason}); the run continues without it")

    @property
    def _states_file(self) -> Path:
        return self._folder.tracking / "trackers.json"

    def _write_states(self) -> None:
        write_json(self._states_file, {name: asdict(state) for name, state in self._states.items()})

    def _read_states(self) -> dict[str, TrackerState]:
        """Return the states that an earlier attempt has written; empty if the file is absent or damaged."""
        try:
            content = read_object(self._states_file)
            return {
                name: TrackerState(str(state["run_id"]), int(state["epoch"]))
                for name, state in content.items()
            }
        except (OSError, ValueError, TypeError, KeyError, OverflowError):
            return {}
