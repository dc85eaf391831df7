"""Read the predictions of a finished run or evaluation, and check them against its ``metrics.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.errors import DataError, UsageError
from finetune.evaluation.summary import JUDGES
from finetune.runs.files import damaged_file
from finetune.runs.folder import RunFolder
from finetune.runs.reader import RunReader
from finetune.targets import METRIC_NAMES, SINGLE, Target, name_probabilities, name_target

_NUMBER_KEYS = ("balanced_accuracy", "f1_macro", "loss", "trained_on")
_INNER_NUMBERS = (("calibration", "ece_calibrated"), ("seconds", "total"))
_KINDS: dict[str, type] = {
    "intervals": dict,
    "calibration": dict,
    "seconds": dict,
    "models": list,
    "features": list,
    "backbone": str,
    "strategy": str,
    "split": str,
}
_TOLERANCES = {"accuracy": 1e-6, "map": 1e-3, "r2": 1e-3}
"""Largest difference of a score in metrics.json from the one recomputed from predictions.csv. Scores of
several labels and of numbers are computed from outputs there, and from their activations here."""


@dataclass(frozen=True)
class RunAnswers:
    """The metrics and predictions of one run or evaluation.

    Attributes:
        name: the name shown to the user.
        folder: the folder of the run or the evaluation.
        metrics: the content of ``metrics.json``.
        classes: class names in index order.
        target: what the labels are; numbers are in their own unit.
        answers: (label, predicted label) of every evaluated image, by path.
        values: probabilities of the classes, or the predicted number, of every image, by path; empty where
            images have one class each.
        digests: sha256 by path, of at least every evaluated image.
        trained_on: paths and sha256 of a run's training images; empty for an evaluation.
    """

    name: str
    folder: RunFolder
    metrics: Mapping[str, Any]
    classes: tuple[str, ...]
    target: Target
    answers: Mapping[str, tuple[str, str]]
    values: Mapping[str, tuple[float, ...]]
    digests: Mapping[str, str]
    trained_on: frozenset[tuple[str, str]]

    @property
    def num_learned(self) -> int | None:
        """The number of trained parameters; None if the folder has no plan."""
        rows = RunReader(self.folder, tolerant=True).plan
        return sum(int(row["parameters"]) for row in rows if row["trained"] == "True") if rows else None


def load_answers(path: Path, name: str) -> RunAnswers:
    """Read a folder of ``finetune run`` or ``finetune evaluate``.

    Raises:
        UsageError: there is no such folder.
        DataError: the run is not finished, or its files are damaged or do not belong together.
    """
    folder = RunFolder(path)
    _check_done(folder)
    missing = [file.name for file in (folder.metrics, folder.predictions) if not file.is_file()]
    if missing:
        found = f"there is no {' and no '.join(missing)}" if path.is_dir() else "there is no such folder"
        fix = "Name folders of finished runs (`finetune run`), or of `finetune evaluate`."
        raise UsageError(str(path), found, fix)
    run = RunReader(folder)
    try:
        target = name_target(run.metrics.get("target"))
        _check_shape(run.metrics, target.score)
    except (ValueError, OverflowError) as error:
        raise damaged_file(folder.metrics, error) from None
    metrics, (answers, values) = run.metrics, _collect_answers(run, target)
    score = _compute_score(run, target, answers, values)
    if abs(score - metrics[target.score]) > _TOLERANCES[target.score]:
        name = METRIC_NAMES[target.score]
        found = f"it says {name} {metrics[target.score]:.4f}, but predictions.csv gives {score:.4f}"
        raise DataError(
            str(folder.metrics), found, "Create the folder again: its files do not belong together."
        )
    _check_known(folder, answers, run.digests)
    learned = [row for row in run.split if row["split"] == "train"] if folder.recipe.is_file() else []
    trained_on = frozenset((row["path"], row["sha256"]) for row in learned)
    return RunAnswers(
        name, folder, metrics, run.predicted_classes, target, answers, values, run.digests, trained_on
    )


def _check_known(folder: RunFolder, answers: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Refuse images without a sha256: the same path may be another image in another folder."""
    unknown = [path for path in answers if not digests.get(path)]
    if unknown:
        found = f"split.csv has no sha256 of {len(unknown)} of its {len(answers)} predicted images"
        fix = (
            "Evaluate it with this version (`finetune evaluate RUN --data FOLDER`), and compare that folder."
        )
        raise DataError(str(folder.path), f"{found} (for example {unknown[0]})", fix)


def _check_done(folder: RunFolder) -> None:
    state = RunReader(folder, tolerant=True).state
    if state == "done":
        return
    outdated = "; its metrics are outdated" if folder.metrics.is_file() else ""
    fix = f"Give its command again, with --output {folder.path}, to resume it."
    raise DataError(str(folder.path), f"the run is not finished ({state}){outdated}", fix)


def _check_shape(metrics: Mapping[str, Any], score: str) -> None:
    """Check the types in ``metrics.json``; every value but the score may be absent or null.

    Raises:
        ValueError: a value has another type, or is not finite.
    """
    if not _is_number(metrics.get(score)):
        raise ValueError(f"it holds no {METRIC_NAMES[score]}")
    for key, kind in _KINDS.items():
        if metrics.get(key) is not None and not isinstance(metrics[key], kind):
            raise ValueError(f"{key} is {metrics[key]!r}")
    inner = {f"{key}.{name}": (metrics.get(key) or {}).get(name) for key, name in _INNER_NUMBERS}
    numbers = {key: metrics.get(key) for key in _NUMBER_KEYS} | inner
    for key, value in numbers.items():
        if value is not None and not _is_number(value):
            raise ValueError(f"{key} is {value!r}, not a finite number")
    limits = (metrics.get("intervals") or {}).get(score)
    is_pair = isinstance(limits, list) and len(limits) == 2 and all(map(_is_number, limits))
    if limits is not None and not is_pair:
        raise ValueError(f"intervals.{score} is {limits!r}, not two finite numbers")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _collect_answers(
    run: RunReader, target: Target
) -> tuple[dict[str, tuple[str, str]], dict[str, tuple[float, ...]]]:
    """Return (label, predicted label), and probabilities or numbers, by path."""
    answers: dict[str, tuple[str, str]] = {}
    values: dict[str, tuple[float, ...]] = {}
    rows = (
        [(row.path, row.label, row.predicted, None) for row in run.predictions]
        if target == SINGLE
        else [(row["path"], row["label"], row["predicted"], row) for row in run.prediction_rows]
    )
    columns = name_probabilities(run.predicted_classes) or ["predicted"]
    for path, label, predicted, row in rows:
        if path in answers:
            raise damaged_file(run.folder.predictions, ValueError(f"{path} occurs twice"))
        answers[path] = label, predicted
        if row is not None:
            values[path] = tuple(_read_number(run, row, column) for column in columns)
    if not answers:
        raise damaged_file(run.folder.predictions, ValueError("it has no rows"))
    return answers, values


def _read_number(run: RunReader, row: Mapping[str, str], column: str) -> float:
    try:
        if math.isfinite(value := float(row[column])):
            return value
    except (LookupError, ValueError):
        pass
    error = ValueError(f"{row['path']} has no number in the column {column}")
    raise damaged_file(run.folder.predictions, error)


def _compute_score(
    run: RunReader,
    target: Target,
    answers: Mapping[str, tuple[str, str]],
    values: Mapping[str, tuple[float, ...]],
) -> float:
    """Return the score that ``predictions.csv`` gives."""
    if not values:
        return sum(label == predicted for label, predicted in answers.values()) / len(answers)
    try:
        labels = target.encode([label for label, _ in answers.values()], run.predicted_classes)
    except (LookupError, ValueError) as error:
        raise damaged_file(run.folder.predictions, error) from None
    weigh = JUDGES[target.kind].weigh_score(np.array([*values.values()]), labels)
    return float(weigh(np.ones((1, len(labels))))[0])
