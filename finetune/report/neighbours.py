"""Runs in the same folder: whether a solved linear classifier was better on the same images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finetune.report.facts import Facts, finite
from finetune.runs.folder import RunFolder
from finetune.runs.reader import PredictionRow, RunReader


@dataclass(frozen=True)
class SolvedRun:
    """A run whose result is a solved linear classifier.

    Attributes:
        run: name of its folder.
        features: the recipe's choice of features (``strategy.features`` or ``strategy.floor``).
        accuracy: on the evaluated images, in [0, 1].
    """

    run: str
    features: str
    accuracy: float


def find_better_linear(facts: Facts) -> SolvedRun | None:
    """Return the best solved linear classifier of the runs beside this one; None if this run is as good.

    A run counts if it lies in the same parent folder, has the same backbone, and evaluated the same images
    under the same labels. A folder that cannot be read is passed over.
    """
    accuracy = facts.number("accuracy")
    if accuracy is None:
        return None
    found = [solved for path in _list_runs(facts.folder) if (solved := _read(path, facts)) is not None]
    best = max(found, key=lambda solved: solved.accuracy, default=None)
    return best if best is not None and best.accuracy > accuracy else None


def _list_runs(folder: RunFolder) -> list[Path]:
    try:
        return sorted(
            path for path in folder.path.resolve().parent.iterdir() if RunFolder(path).metrics.is_file()
        )
    except OSError:
        return []


def _read(path: Path, facts: Facts) -> SolvedRun | None:
    run = RunReader(RunFolder(path), tolerant=True)
    accuracy, recipe = finite(run.metrics.get("accuracy")), run.recipe
    if accuracy is None or recipe is None or not run.metrics.get("features"):
        return None
    if run.metrics.get("backbone") != facts.metrics.get("backbone"):
        return None
    if _name_images(run.predictions) != _name_images(facts.predictions):
        return None
    choice = recipe.strategy.features or recipe.strategy.floor
    return SolvedRun(path.name, choice, accuracy) if choice else None


def _name_images(predictions: tuple[PredictionRow, ...]) -> set[tuple[str, str]]:
    return {(row.path, row.label) for row in predictions}
