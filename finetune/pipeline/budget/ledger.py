"""What a budget has measured, kept after each measurement, so that a kill loses at most one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from finetune.pipeline.budget.candidates import Candidate, Side, View
from finetune.recipe import Recipe, flatten, load_recipe
from finetune.runs.claim import NO_EFFECT
from finetune.runs.files import write_csv, write_json, write_text
from finetune.runs.folder import RunFolder
from finetune.runs.reader import RunReader

_NAMES = ("backbone", "img_size", "strategy", "features", "epochs")
COLUMNS = (*_NAMES, "num_images", "score", "error", "num_held", "solved", "seconds", "ended", "reason")
"""Columns of ``budget.csv``."""


@dataclass(frozen=True)
class Cost:
    """Measured seconds of a view: to open its network, and for each image to compute and score features."""

    load: float
    image: float


@dataclass(frozen=True)
class Trial:
    """A candidate on a number of training images.

    Attributes:
        candidate: what was tried.
        num_images: training images that were used; 0 if it was not started.
        score: accuracy in [0, 1] on training images that it did not learn from; None if it was not measured.
        error: standard error of the score.
        num_held: images that the score is of.
        solved: score of the classifier that a fine-tuning began with, on the same images.
        seconds: measured seconds.
        ended: seconds since the budget began.
        reason: why it was not started, or not possible.
    """

    candidate: Candidate
    num_images: int = 0
    score: float | None = None
    error: float | None = None
    num_held: int = 0
    solved: float | None = None
    seconds: float = 0.0
    ended: float = 0.0
    reason: str = ""

    @property
    def lead(self) -> float:
        """What fine-tuning gained over the classifier that it began with; 0 for others."""
        return 0.0 if self.score is None or self.solved is None else self.score - self.solved

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        one = self.candidate
        names = (one.view.backbone, one.view.img_size, one.strategy, one.features, one.epochs)
        own = {key: value for key, value in asdict(self).items() if key != "candidate"}
        own |= {"seconds": round(self.seconds, 2), "ended": round(self.ended, 2)}
        return dict(zip(_NAMES, names, strict=True)) | own

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Trial:
        """Return the trial of :meth:`to_dict`.

        Raises:
            LookupError, TypeError, ValueError: it is damaged.
        """
        own = dict(values)
        backbone, size, *others = (own.pop(name) for name in _NAMES)
        return cls(Candidate(View(backbone, _read_side(size)), *others), **own)


def _read_side(value: Any) -> Side:
    return (int(value[0]), int(value[1])) if isinstance(value, list) else int(value)


def describe_asked(recipe: Recipe) -> str:
    """Return a digest of what a search depends on, but for its budget."""
    values = {key: value for key, value in flatten(recipe.to_dict()) if key not in ("budget", *NO_EFFECT)}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def apply_keys(recipe: Recipe, keys: Mapping[str, Any]) -> Recipe:
    """Return the recipe with the keys of a view or a candidate, and without a budget."""
    return load_recipe(None, dict(flatten(recipe.to_dict())) | dict(keys) | {"budget": None})


@dataclass
class Ledger:
    """What is known so far.

    Attributes:
        folder: run folder that holds the files.
        recipe: what was asked for.
        images: digest of the training images.
        spent: seconds of earlier attempts.
        trials: one for each candidate and number of images.
        costs: measured costs, by view.
        chosen: what the search ended with; None before that.
    """

    folder: RunFolder
    recipe: Recipe
    images: str
    spent: float = 0.0
    trials: list[Trial] = field(default_factory=list)
    costs: dict[View, Cost] = field(default_factory=dict)
    chosen: Trial | None = None

    @property
    def solved(self) -> list[Trial]:
        """The measured linear classifiers."""
        return [one for one in self.trials if one.score is not None and one.candidate.strategy == "freeze"]

    @property
    def tuned(self) -> Trial | None:
        """The measured fine-tuning; None if there is none."""
        return next((one for one in self.trials if one.solved is not None), None)

    def find(self, view: View, num_images: int) -> Trial | None:
        """Return the best linear classifier of a view on a number of images; None if there is none."""
        same = (one for one in self.solved if (one.candidate.view, one.num_images) == (view, num_images))
        return min(same, key=_order, default=None)

    def find_best(self) -> Trial | None:
        """Return the linear classifier with the highest score on the most images; None if there is none."""
        return min(self.solved, key=_order, default=None)

    def add(self, trial: Trial) -> None:
        """Add a trial, in place of one that was not started, or on as many images, of the same candidate."""
        old = ((trial.candidate, 0), (trial.candidate, trial.num_images))
        self.trials = [one for one in self.trials if (one.candidate, one.num_images) not in old] + [trial]

    def save(self, spent: float) -> None:
        """Write the files, each at once and whole.

        Args:
            spent: seconds since the budget began, over all attempts.

        Raises:
            DiskError: a file cannot be written.
        """
        best = self.chosen or self.find_best()
        if best is not None:
            write_text(self.folder.best_recipe, apply_keys(self.recipe, best.candidate.keys).to_yaml())
        rows = [one.to_dict() for one in self.trials]
        costs = [vars(view) | vars(cost) for view, cost in self.costs.items()]
        content = {
            "asked": describe_asked(self.recipe),
            "images": self.images,
            "budget": self.recipe.budget,
            "spent_seconds": round(spent, 2),
            "costs": costs,
            "candidates": rows,
            "best": best.to_dict() if best is not None else None,
            "chosen": self.chosen.candidate.keys if self.chosen is not None else None,
        }
        write_json(self.folder.budget, content)
        write_csv(self.folder.budget_table, [[row[name] for name in COLUMNS] for row in rows], COLUMNS)


def _order(trial: Trial) -> tuple[Any, ...]:
    """Return what sorts trials: on the most images first, then the highest score."""
    return -trial.num_images, -(trial.score or 0.0), trial.candidate.view.rank


def read_ledger(folder: RunFolder, recipe: Recipe, images: str) -> Ledger:
    """Return the ledger of a folder; an empty one if there is none, or it is of other images or damaged.

    What was not started is forgotten: the search decides again.
    """
    content, ledger = RunReader(folder, tolerant=True).budget, Ledger(folder, recipe, images)
    if content.get("images") != images:
        return ledger
    try:
        trials = [Trial.from_dict(row) for row in content["candidates"]]
        costs = {
            View(row["backbone"], _read_side(row["img_size"])): Cost(float(row["load"]), float(row["image"]))
            for row in content["costs"]
        }
        spent = float(content["spent_seconds"])
    except (LookupError, TypeError, ValueError):
        return ledger
    measured = [one for one in trials if one.score is not None]
    return Ledger(folder, recipe, images, spent, measured, costs)
