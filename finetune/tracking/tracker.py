"""The interface of an experiment tracker, and the facts about a run that it gets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from finetune.errors import sanitize
from finetune.recipe import Recipe, flatten

PROJECT = "finetune"
"""Project or experiment of a run, unless the tracker's own environment variable names another one."""

EPOCH_METRICS = ("train_loss", "eval_loss", "eval_accuracy", "lr", "images_per_second")
"""Columns of ``history.csv`` that trackers get, with the epoch as the step."""

End = Literal["done", "interrupted", "failed"]


@dataclass(frozen=True)
class TrackedRun:
    """The facts about a run that a tracker gets, without secrets.

    Attributes:
        name: name of the run folder.
        folder: absolute path of the run folder, where model and report are.
        home: folder in which a tracker may store its own files.
        settings: values of the resolved recipe, by dotted key.
        recipe: the resolved recipe as YAML.
    """

    name: str
    folder: str
    home: Path
    settings: Mapping[str, Any]
    recipe: str


class Tracker(Protocol):
    """An open client of one tracker. Any call may raise any error; the caller then drops the tracker."""

    @property
    def run_id(self) -> str:
        """The tracker's id of the run, by which a later process resumes it; empty if the folder suffices."""

    def log_epoch(self, row: Mapping[str, float]) -> None:
        """Log one row of the history."""

    def log_final(self, metrics: Mapping[str, float], epoch: int) -> None:
        """Log the final metrics after ``epoch`` epochs."""

    def close(self, end: End) -> None:
        """Write what is buffered, and record how the run ended."""


def describe_run(recipe: Recipe, folder: Path) -> TrackedRun:
    """Return the facts that trackers get before a run begins, without secrets."""
    path = folder.absolute()
    settings = {key: _clean(value) for key, value in flatten(recipe.to_dict())}
    lines = [sanitize(line) for line in recipe.to_yaml().splitlines()]  # sanitize would escape line ends
    return TrackedRun(
        sanitize(path.name), sanitize(str(path)), path / "tracking", settings, "\n".join(lines) + "\n"
    )


def _clean(value: Any) -> Any:
    return sanitize(value) if isinstance(value, str) else value


def flatten_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of ``metrics.json`` by dotted key, without lists, booleans and nulls."""
    return dict(_numbers(metrics, ""))


def _numbers(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", float(value)
