"""What a network forgot when it learned more: it and the one before it, on the same images of old classes.

Shape legend: N images, K classes of the network before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune.errors import count
from finetune.evaluation.answers import RunAnswers, load_answers
from finetune.evaluation.paired_scores import PairedScores, ScoredRun, compare_scores
from finetune.evaluation.paired_tests import PairedTest, compare_pairs
from finetune.evaluation.predictions import Predictions
from finetune.evaluation.summary import JUDGES
from finetune.evaluation.variants import Model, compute_variants, load_model
from finetune.features.extraction import open_images
from finetune.recipe import Recipe
from finetune.runs.files import write_csv
from finetune.system.display import Display
from finetune.targets import METRIC_NAMES, SINGLE, decide

COLUMNS = ("class", "images", "before", "after", "difference", "low", "high")
ALL_OLD = "(all old classes)"
"""Name of the row over all classes that the network before knew."""
_BEFORE, _AFTER = "the run before", "the new run"


@dataclass(frozen=True)
class Forgetting:
    """The scores of a network and of the one before it, on the evaluated images of old classes.

    Attributes:
        split: the split of these images, val or test.
        test: both scores, and their difference with its 95 % interval.
        rows: class, images, score before and after; of one class an image also each class, new ones without a
            score before.
    """

    split: str
    test: PairedTest | PairedScores
    rows: tuple[tuple[object, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in self.rows]
        return {"split": self.split, "sentence": self.sentence, "claimed": self.test.is_claimed, "rows": rows}

    @property
    def sentence(self) -> str:
        """The result as a sentence."""
        before, after = self.rows[0][2], self.rows[0][3]
        metric = "accuracy" if isinstance(self.test, PairedTest) else METRIC_NAMES[self.test.metric]
        images = count(self.test.num_images, f"{self.split} image")
        return f"old classes: {metric} {before} before and {after} now on {images}; {self.test.sentence}"


def measure_forgetting(before: Path, after: Path, display: Display) -> Forgetting | None:
    """Compare a run with the one that it extends; None if no evaluated image is of an old class.

    Args:
        before: the run that was extended.
        after: the new run, finished.
        display: shows progress.

    Raises:
        DataError: the new run's files are damaged, or its images changed.
    """
    model, now = load_model(str(before), "auto", None, None, offline=True), load_answers(after, _AFTER)
    found = _predict(model, now, after, display)
    if found is None:
        return None
    split, paths, old = found
    if model.predictor.target == SINGLE:
        return _compare_classes(split, paths, old, model.predictor.classes, now)
    labels, classes = old.labels, model.predictor.classes
    order = [now.classes.index(name) for name in classes] if now.classes else [0]
    values = np.array([now.values[path] for path in paths])[:, order]
    runs = ScoredRun(_BEFORE, old.probabilities.numpy()), ScoredRun(_AFTER, values)
    target = model.predictor.target
    [test] = compare_scores([(*runs, labels)], JUDGES[target.kind], target.score)
    low, high = test.interval
    scores = (test.first_score, test.second_score, test.difference, low, high)
    return Forgetting(split, test, ((ALL_OLD, len(paths), *map(_format, scores)),))


def _predict(
    model: Model, now: RunAnswers, after: Path, display: Display
) -> tuple[str, list[str], Predictions] | None:
    """Return split and paths of the evaluated images of old classes, and what the model predicts for them."""
    predictor = model.predictor
    found = open_images(Recipe.model_validate({"data": {"path": str(after)}}), display)
    classes = predictor.classes
    old = {
        sample.path
        for sample in found.samples
        if sample.path in now.answers and {*found.target.classes_of(found.label_of(sample))} <= {*classes}
    }
    samples = tuple(sample for sample in found.samples if sample.path in old)
    if not samples:
        return None
    labels = found.labels
    if predictor.target == SINGLE:
        index = {name: number for number, name in enumerate(classes)}
        samples = tuple(replace(one, label=index[labels[one.label]]) for one in samples)
        labels = ()
    dataset = replace(found, classes=classes, samples=samples, target=predictor.target, label_texts=labels)
    [variant] = compute_variants([model], dataset, 1, (), display)
    return samples[0].split, [sample.path for sample in samples], variant.predictions


def _compare_classes(
    split: str, paths: Sequence[str], old: Predictions, classes: Sequence[str], now: RunAnswers
) -> Forgetting:
    labels = np.array([now.answers[path][0] for path in paths])
    rights = (decide(old.logits) == old.labels).numpy(), _rights(now, paths)
    [test] = compare_pairs([(_BEFORE, rights[0], _AFTER, rights[1])])
    scores = (test.first_accuracy, test.second_accuracy, test.difference, *test.interval)
    rows: list[tuple[object, ...]] = [(ALL_OLD, len(paths), *map(_format, scores))]
    for name in classes:
        if (own := labels == name).any():
            shares = [float(right[own].mean()) for right in rights]
            change = _format(shares[1] - shares[0])
            rows.append((name, int(own.sum()), *map(_format, shares), change, "", ""))
    for name in now.classes:
        if name not in classes:
            own_paths = [path for path, (label, _) in now.answers.items() if label == name]
            after = _format(float(_rights(now, own_paths).mean())) if own_paths else ""
            rows.append((name, len(own_paths), "", after, "", "", ""))
    return Forgetting(split, test, tuple(rows))


def _rights(now: RunAnswers, paths: Sequence[str]) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    return np.array([now.answers[path][0] == now.answers[path][1] for path in paths], np.bool_)


def _format(value: float) -> str:
    return f"{value:.4f}"


def write_forgetting(path: Path, found: Forgetting) -> None:
    """Write ``forgotten.csv``.

    Raises:
        DiskError: it cannot be written.
    """
    write_csv(path, found.rows, COLUMNS)
