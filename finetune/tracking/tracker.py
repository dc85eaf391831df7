"""What a tracker is told, and what it says of itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from finetune.errors import sanitize
from finetune.recipe import Recipe, flatten

PROJECT = "finetune"
"""Project or experiment of runs for which the tracker's own variable names none."""

EPOCH_METRICS = ("train_loss", "eval_loss", "eval_accuracy", "lr", "images_per_second")
"""Columns of ``history.csv`` that trackers are told, with the epoch as the step."""

End = Literal["done", "interrupted", "failed"]


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker is told of.

    Attributes:
        name: of the run folder.
        folder: its absolute path; the only link to model and report.
        home: where a tracker may keep files of its own.
        settings: of the resolved recipe, by dotted key, without secrets.
        recipe: the same as YAML.
    """

    name: str
    folder: str
    home: Path
    settings: Mapping[str, Any]
    recipe: str


class Tracker(Protocol):
    """A client of one tracker, open. Any call may raise anything: the caller drops it then."""

    @property
    def run_id(self) -> str:
        """By which a later process finds the same run again; empty where the folder says it all."""

    def log_epoch(self, row: Mapping[str, float]) -> None:
        """Tell one row of the history."""

    def log_final(self, figures: Mapping[str, float], epoch: int) -> None:
        """Tell the final metrics, of so many epochs."""

    def close(self, end: End) -> None:
        """Write what is left, and say how the run ended."""


def describe_run(recipe: Recipe, folder: Path) -> TrackedRun:
    """Return what trackers are told of a run before it begins: nothing that is secret."""
    path = folder.absolute()
    settings = {key: _clean(value) for key, value in flatten(recipe.to_dict())}
    lines = [sanitize(line) for line in recipe.to_yaml().splitlines()]  # which escapes a line end, too
    return TrackedRun(
        sanitize(path.name), sanitize(str(path)), path / "tracking", settings, "\n".join(lines) + "\n"
    )


def _clean(value: Any) -> Any:
    return sanitize(value) if isinstance(value, str) else value


def flatten_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of ``metrics.json`` by dotted key: no lists, no truth values, nothing undefined."""
    return dict(_numbers(metrics, ""))


def _numbers(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", float(value)
