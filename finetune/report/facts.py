"""What the files of a run say, as far as they are there; nothing here computes a metric anew.

An evaluation's folder has fewer files than a run's, and an old run's ``metrics.json`` fewer keys. What is
absent is None or empty, and the page leaves it out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from finetune.data.dataset import SPLITS
from finetune.recipe import Recipe
from finetune.runs.folder import RunFolder
from finetune.runs.reader import CsvRow, PredictionRow, RunReader

JUDGED = "judged"
"""The part that images are in of which it is not known, or does not matter, which one they were in."""
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class IssueFact:
    """Something that the look at the data found: error, warning or note, in words, with what to do."""

    severity: str
    message: str
    fix: str
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """The content of a run's files.

    Attributes:
        folder: whose files they are.
        metrics: of ``metrics.json``.
        classes: names in index order.
        confusion: counts, a row a true class; empty where there is no table.
        per_class: rows of ``per_class.csv``.
        predictions: in the order of the file.
        history: rows of ``history.csv``, as numbers.
        plan: rows of ``plan.csv``.
        split: rows ``path,label,split`` of a run's ``split.csv``; that of an evaluation names what it judged
            alone, and nothing that was trained on.
        check: of ``check.json``.
        environment: of ``environment.json``.
        advice: of ``advice.json``.
        recipe: of ``recipe.yaml``.
        damaged: names of files that are there and cannot be read.
    """

    folder: RunFolder
    metrics: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()
    per_class: tuple[CsvRow, ...] = ()
    predictions: tuple[PredictionRow, ...] = ()
    history: tuple[Mapping[str, float], ...] = ()
    plan: tuple[CsvRow, ...] = ()
    split: tuple[CsvRow, ...] = ()
    check: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    advice: Mapping[str, Any] = field(default_factory=dict)
    recipe: Recipe | None = None
    damaged: tuple[str, ...] = ()

    def number(self, *keys: str) -> float | None:
        """Return a finite number of ``metrics.json``, by its keys from the outside in; None without one."""
        value: Any = self.metrics
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return finite(value)

    def interval(self, name: str) -> tuple[float, float] | None:
        """Return a figure's 95 % interval."""
        intervals = self.metrics.get("intervals")
        pair = intervals.get(name) if isinstance(intervals, Mapping) else None
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            return None
        low, high = finite(pair[0]), finite(pair[1])
        return None if low is None or high is None else (low, high)

    def rows(self, *keys: str) -> list[Mapping[str, Any]]:
        """Return a list of objects of ``metrics.json``, by its keys; empty without one."""
        value: Any = self.metrics
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []

    @cached_property
    def findings(self) -> list[IssueFact]:
        """What the look at the data found, as far as it is told in words."""
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
    def mistakes(self) -> list[PredictionRow]:
        """Wrong predictions, the surest first."""
        return sorted((one for one in self.predictions if not one.is_right), key=lambda one: -one.confidence)

    @cached_property
    def confused(self) -> list[tuple[str, str, int, int]]:
        """Pairs of true and predicted class, how often, and of how many images; the most frequent first."""
        pairs = [
            (label, guess, count, sum(counts))
            for label, counts in zip(self.classes, self.confusion, strict=True)
            for guess, count in zip(self.classes, counts, strict=True)
            if count and guess != label
        ]
        return sorted(pairs, key=lambda pair: -pair[2])

    @cached_property
    def counts(self) -> dict[str, Counter[str]]:
        """Images by part and class, the training split first; where no parts are known, what was judged."""
        parts = {row["split"] for row in self.split}
        order = [*(part for part in SPLITS if part in parts), *sorted(parts - set(SPLITS))]
        found: dict[str, Counter[str]] = {part: Counter() for part in order}
        for row in self.split:
            found[row["split"]][row["label"]] += 1
        if not found and self.predictions:
            part = self.metrics.get("split")
            name = part if part in ("val", "test") else JUDGED
            found[name] = Counter(one.label for one in self.predictions)
        return found

    @cached_property
    def contradiction(self) -> str:
        """How ``predictions.csv`` disagrees with ``metrics.json``; nothing where it does not."""
        judged, accuracy = self.number("num_samples"), self.number("accuracy")
        rows = len(self.predictions)
        if not rows or judged is None:
            return ""
        if rows != judged:
            return f"predictions.csv has {rows:,} rows, and metrics.json speaks of {judged:,.0f} images"
        share = 1 - len(self.mistakes) / rows
        if accuracy is not None and abs(share - accuracy) > _TOLERANCE:
            return f"in predictions.csv {100 * share:.2f} % are right, in metrics.json {100 * accuracy:.2f} %"
        return ""


def finite(value: Any) -> float | None:
    """Return a finite number, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def load_facts(folder: RunFolder) -> Facts:
    """Return what the files say; one that is damaged counts as absent, and is named."""
    run = RunReader(folder, tolerant=True)
    labels, confusion = run.confusion
    return Facts(
        folder=folder,
        metrics=run.metrics,
        classes=labels or run.classes,
        confusion=confusion,
        per_class=run.per_class,
        predictions=run.predictions,
        history=run.history,
        plan=run.plan,
        split=run.split if folder.recipe.is_file() else (),
        check=run.check,
        environment=run.environment,
        advice=run.advice,
        recipe=run.recipe,
        damaged=tuple(run.damaged),
    )
