"""The content of a run folder's files for the report; no metric is recomputed here.

An evaluation's folder has fewer files than a run's, and an old run's ``metrics.json`` fewer keys. Missing
values are None or empty, and the report leaves them out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from finetune.data.dataset import SPLITS
from finetune.recipe import Recipe
from finetune.report.mistakes import Mistake, list_mistakes
from finetune.runs.folder import RunFolder
from finetune.runs.reader import CsvRow, PredictionRow, RunReader
from finetune.targets import Target, name_target

EVALUATED = "evaluated"
"""Name of the split if it is unknown or mixed."""
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class IssueFact:
    """An issue that the data check reported: severity (error, warning or note), message and fix."""

    severity: str
    message: str
    fix: str
    paths: tuple[str, ...]


class ConfusedTwo(NamedTuple):
    """Two classes and their mistakes.

    Attributes:
        first: one class.
        second: the other.
        there: images of the first that were predicted as the second.
        back: images of the second that were predicted as the first.
        images: evaluated images of both.
    """

    first: str
    second: str
    there: int
    back: int
    images: int

    @property
    def mistakes(self) -> int:
        """Images of one that were predicted as the other, both ways."""
        return self.there + self.back


@dataclass(frozen=True)
class Facts:
    """The content of a run's files.

    Attributes:
        folder: the run or evaluation.
        metrics: content of ``metrics.json``.
        classes: names in index order.
        confusion: (K, K) counts by true and predicted class; empty if there is no table.
        cooccurrence: (K, K) images that have two classes; empty where images have one.
        numbers: true and predicted number of each image; empty where labels are classes.
        per_class: rows of ``per_class.csv``.
        predictions: in the order of the file.
        history: rows of ``history.csv``, as numbers.
        plan: rows of ``plan.csv``.
        split: rows ``path,label,split`` of a run's ``split.csv``; empty for an evaluation, whose
            ``split.csv`` lists only evaluated images.
        check: content of ``check.json``.
        environment: content of ``environment.json``.
        answers: all columns of ``predictions.csv`` where labels are not one class an image.
        advice: content of ``advice.json``.
        recipe: content of ``recipe.yaml``; None if it cannot be read.
        damaged: names of files that exist and cannot be read.
    """

    folder: RunFolder
    metrics: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()
    cooccurrence: tuple[tuple[int, ...], ...] = ()
    numbers: tuple[tuple[float, float], ...] = ()
    per_class: tuple[CsvRow, ...] = ()
    predictions: tuple[PredictionRow, ...] = ()
    answers: tuple[CsvRow, ...] = ()
    history: tuple[Mapping[str, float], ...] = ()
    plan: tuple[CsvRow, ...] = ()
    split: tuple[CsvRow, ...] = ()
    check: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    advice: Mapping[str, Any] = field(default_factory=dict)
    recipe: Recipe | None = None
    damaged: tuple[str, ...] = ()

    @cached_property
    def target(self) -> Target:
        """What the labels are; one class an image if the files do not say."""
        return name_target(self.metrics.get("target"))

    def number(self, *keys: str) -> float | None:
        """Return a finite number of ``metrics.json`` by its nested keys; None if there is none."""
        value: Any = self.metrics
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return finite(value)

    def interval(self, name: str) -> tuple[float, float] | None:
        """Return a metric's 95 % interval (low, high); None if there is none."""
        intervals = self.metrics.get("intervals")
        pair = intervals.get(name) if isinstance(intervals, Mapping) else None
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            return None
        low, high = finite(pair[0]), finite(pair[1])
        return None if low is None or high is None else (low, high)

    def rows(self, *keys: str) -> list[Mapping[str, Any]]:
        """Return a list of objects of ``metrics.json`` by its nested keys; empty if there is none."""
        value: Any = self.metrics
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []

    @property
    def classes_not_judged(self) -> list[str]:
        """Names of the classes without an evaluated image."""
        names = self.metrics.get("classes_not_judged")
        return list(map(str, names)) if isinstance(names, list) else []

    @cached_property
    def findings(self) -> list[IssueFact]:
        """Issues of the data check that have a message."""
        found = self.check.get("findings")
        rows = [row for row in found if isinstance(row, Mapping)] if isinstance(found, list) else []
        return [
            IssueFact(
                str(row.get("severity", "warning")),
                str(row["message"]),
                str(row.get("fix") or ""),
                tuple(map(str, row["paths"])) if isinstance(row.get("paths"), list) else (),
            )
            for row in rows
            if row.get("message")
        ]

    @cached_property
    def mistakes(self) -> list[Mistake]:
        """Wrong answers, the worst first."""
        return list_mistakes(self.target, map(vars, self.predictions) if self.predictions else self.answers)

    @property
    def num_answers(self) -> int:
        """Number of evaluated images in ``predictions.csv``."""
        return len(self.predictions or self.answers)

    @property
    def _rows_of_confusion(self) -> list[tuple[str, tuple[int, ...]]]:
        """Each class with its row of the confusion matrix; empty if there is no table."""
        return list(zip(self.classes, self.confusion, strict=True)) if self.confusion else []

    @cached_property
    def confused(self) -> list[tuple[str, str, int, int]]:
        """(true class, predicted class, count, images of the true class); the most frequent first."""
        pairs = [
            (label, guess, count, sum(counts))
            for label, counts in self._rows_of_confusion
            for guess, count in zip(self.classes, counts, strict=True)
            if count and guess != label
        ]
        return sorted(pairs, key=lambda pair: -pair[2])

    @cached_property
    def confused_two(self) -> list[ConfusedTwo]:
        """Every two classes with mistakes between them; the most frequent first."""
        counts = {(label, guess): count for label, guess, count, _ in self.confused}
        totals = {label: sum(row) for label, row in self._rows_of_confusion}
        twos = [
            ConfusedTwo(
                one,
                other,
                counts.get((one, other), 0),
                counts.get((other, one), 0),
                totals[one] + totals[other],
            )
            for one, other in sorted({(min(pair), max(pair)) for pair in counts})
        ]
        return sorted(twos, key=lambda two: -two.mistakes)

    @cached_property
    def counts(self) -> dict[str, Counter[str]]:
        """Number of images by split and class, training first; of evaluated images if no split is known."""
        splits = {row["split"] for row in self.split}
        order = [*(split for split in SPLITS if split in splits), *sorted(splits - set(SPLITS))]
        found: dict[str, Counter[str]] = {split: Counter() for split in order}
        for row in self.split:
            found[row["split"]].update(self.target.classes_of(row["label"]))
        if not found and self.predictions:
            split = self.metrics.get("split")
            name = split if split in ("val", "test") else EVALUATED
            found[name] = Counter(row.label for row in self.predictions)
        return found

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Number of images by split, in the order of :attr:`counts`."""
        images = Counter(row["split"] for row in self.split)
        return {split: images[split] or sum(counts.values()) for split, counts in self.counts.items()}

    @cached_property
    def contradiction(self) -> str:
        """How ``predictions.csv`` disagrees with ``metrics.json``; empty if they agree."""
        num_samples, accuracy = self.number("num_samples"), self.number("accuracy")
        rows = self.num_answers
        if not rows or num_samples is None:
            return ""
        if rows != num_samples:
            return f"predictions.csv has {rows:,} rows, but metrics.json counts {num_samples:,.0f} images"
        share = 1 - len(self.mistakes) / rows
        if accuracy is not None and abs(share - accuracy) > _TOLERANCE:
            shares = f"{100 * share:.2f} % in predictions.csv, {100 * accuracy:.2f} % in metrics.json"
            return f"the accuracy is {shares}"
        return ""


def finite(value: Any) -> float | None:
    """Return a finite number, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def finite_text(text: str) -> float | None:
    """Return the finite number in a table cell; None for ``n/a`` and other text."""
    try:
        return finite(float(text))
    except ValueError:
        return None


def load_facts(folder: RunFolder) -> Facts:
    """Read the files of a folder; a damaged file counts as missing and is listed in ``damaged``."""
    run = RunReader(folder, tolerant=True)
    labels, confusion = run.confusion
    return Facts(
        folder=folder,
        metrics=run.metrics,
        classes=labels or run.classes,
        confusion=confusion,
        cooccurrence=run.cooccurrence[1],
        numbers=run.numbers,
        per_class=run.per_class,
        predictions=run.predictions,
        answers=() if run.predictions else run.prediction_rows,
        history=run.history,
        plan=run.plan,
        split=run.split if folder.recipe.is_file() else (),
        check=run.check,
        environment=run.environment,
        advice=run.advice,
        recipe=run.recipe,
        damaged=tuple(run.damaged),
    )
