"""The metrics, thresholds and tables of several labels an image.

Every class is a decision of its own. Its threshold is the one with the highest F1 on validation images. Where
these are the evaluated images, metrics are cross-fitted: each image is decided with thresholds that the
images of other folds chose. Average precision needs no threshold.

Shape legend: N images, K classes, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from finetune.evaluation.predictions import Predictions
from finetune.evaluation.resampling import Floats, Weights, resample
from finetune.evaluation.single_label import PROBABILITY_COLUMNS, find_label_issues
from finetune.evaluation.tables import EvaluatedImage, LabelIssue, Summary, write_predictions
from finetune.runs.files import write_csv
from finetune.runs.folder import RunFolder
from finetune.targets import SEPARATOR, MultiLabel, average_precisions, name_probabilities

NUM_FOLDS = 5
"""Folds of the images if the same ones both choose thresholds and measure their effect."""
NUM_BINS = 10
"""Bins of the calibration error of a class."""
UNKNOWN = "n/a"
"""Cell of a table for a metric that is not defined."""
CLASS_COLUMNS = (
    "label",
    "average_precision",
    "precision",
    "recall",
    "f1",
    "support",
    "predicted",
    "threshold",
    "ece",
)

Bools = npt.NDArray[np.bool_]


class MultiLabelJudge:
    """Judges several labels an image (:class:`finetune.evaluation.summary.Judge`)."""

    issue_columns = PROBABILITY_COLUMNS

    def summarize(self, evaluated: Predictions, val: Predictions | None, classes: Sequence[str]) -> Summary:
        """Return all metrics, with thresholds chosen on validation images."""
        fitting = evaluated if val is None else val
        chosen = MultiLabel(choose_thresholds(fitting.probabilities, fitting.labels))
        decided = None if val is not None else decide_cross_fitted(evaluated.probabilities, evaluated.labels)
        predictions = replace(evaluated, target=chosen)
        metrics = _measure(predictions, classes, decided) | {
            "thresholds": {"fitted_on": "val", "same_images": val is None},
        }
        return Summary(predictions, 1.0, metrics, chosen)

    def measure(self, predictions: Predictions, classes: Sequence[str]) -> dict[str, Any]:
        """Return the metrics and their intervals, with the thresholds of the predictions' target."""
        return _measure(predictions, classes, None)

    def write_tables(
        self,
        folder: RunFolder,
        images: Sequence[EvaluatedImage],
        predictions: Predictions,
        classes: Sequence[str],
    ) -> None:
        """Write ``predictions.csv``, ``per_class.csv`` and ``cooccurrence.csv``."""
        columns = ("path", "label", "predicted", *name_probabilities(classes))
        write_predictions(folder, columns, _list_predictions(images, predictions, classes))
        write_csv(folder.per_class, _list_by_class(predictions, classes), CLASS_COLUMNS)
        together = (predictions.labels.T @ predictions.labels).long().tolist()
        rows = [(name, *counts) for name, counts in zip(classes, together, strict=True)]
        write_csv(folder.cooccurrence, rows, ("label", *classes))

    def weigh_score(self, values: Floats, labels: Tensor) -> Callable[[Weights], Floats]:
        """Return the mean average precision as a function of weights."""
        truth = labels.numpy() > 0
        return lambda weights: _weigh_precision(values, truth, weights)

    def find_issues(self, predictions: Predictions, classes: Sequence[str]) -> list[LabelIssue]:
        """Return the images of which a class, or its absence, is suspected, with all of these corrected.

        The probability is that of the least probable class, or absence of a class, of the label.
        """
        probabilities, labels = predictions.probabilities, predictions.labels.long()
        wrong: dict[int, list[tuple[float, int]]] = {}
        for k in range(len(classes)):
            both = torch.stack([1 - probabilities[:, k], probabilities[:, k]], dim=1)
            for place in find_label_issues(labels[:, k], both).tolist():
                wrong.setdefault(place, []).append((both[place, labels[place, k]].item(), k))
        issues = []
        for place, found in wrong.items():
            changed = {k for _, k in found}
            names = [name for k, name in enumerate(classes) if bool(labels[place, k]) != (k in changed)]
            least, _ = min(found)
            captions = (f": {least:.3f}", f": {1 - least:.3f}")
            issues.append(LabelIssue(place, SEPARATOR.join(names), (least, 1 - least), captions))
        return sorted(issues, key=lambda issue: issue.values[0])

    def describe(self, metrics: Mapping[str, Any]) -> str:
        """Return mean average precision with its interval, and micro and macro F1."""
        interval = metrics["intervals"].get("map")
        limits = f" (95 % interval {interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
        return (
            f"mean average precision {metrics['map']:.4f}{limits}, micro F1 {metrics['f1_micro']:.4f}, "
            f"macro F1 {metrics['f1_macro']:.4f}"
        )


# --- thresholds ----------------------------------------------------------------------------------


def choose_thresholds(probabilities: Tensor, labels: Tensor) -> tuple[float, ...]:
    """Return the probability with the highest F1 for each class; 0.5 for a class without images.

    A threshold lies midway between two images' probabilities, so that rounding moves neither across it.

    Args:
        probabilities: (N, K).
        labels: (N, K), 1 for the classes of an image.
    """
    scores, truth = probabilities.double().numpy(), labels.numpy() > 0
    return tuple(_choose(scores[:, k], truth[:, k]) for k in range(scores.shape[1]))


def _choose(scores: Floats, truth: Bools) -> float:
    if not truth.any():
        return 0.5
    order = np.argsort(-scores, kind="stable")
    descending, hits = scores[order], truth[order].cumsum()
    f1 = 2 * hits / (np.arange(1, len(order) + 1) + truth.sum())
    is_last = np.append(descending[1:] != descending[:-1], True)  # equal scores are decided together
    best = int(np.flatnonzero(is_last)[f1[is_last].argmax()])
    below = descending[best + 1] if best + 1 < len(order) else 0.0
    return float((descending[best] + below) / 2)


def decide_cross_fitted(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return decisions (N, K) bool, each by thresholds that the images of other folds chose."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    folds = torch.empty(len(labels), dtype=torch.int64)
    folds[order] = torch.arange(len(labels)) % NUM_FOLDS
    decided = torch.zeros(labels.shape, dtype=torch.bool)
    for fold in range(NUM_FOLDS):
        inside, others = folds == fold, folds != fold
        if inside.any() and others.any():
            target = MultiLabel(choose_thresholds(probabilities[others], labels[others]))
            decided[inside] = target.decide(probabilities[inside])
    return decided


# --- metrics -------------------------------------------------------------------------------------


def _measure(predictions: Predictions, classes: Sequence[str], decided: Tensor | None) -> dict[str, Any]:
    """Return metrics and intervals; ``decided`` replaces the decisions of the target's thresholds."""
    assert isinstance(predictions.target, MultiLabel)
    if decided is None:
        decided = predictions.target.decide(predictions.probabilities)
    truth, said = predictions.labels.numpy() > 0, decided.numpy()
    has_images = np.asarray(truth.any(axis=0))
    one = np.ones((1, len(truth)))
    f1 = _weigh_f1(truth, said, one)
    precision, recall = _precision_and_recall(truth, said)
    metrics: dict[str, Any] = {
        "map": predictions.score,
        "f1_micro": float(_weigh_micro(truth, said, one)[0]),
        "f1_macro": float(np.nanmean(f1[0])) if has_images.any() else 0.0,
        "precision_macro": float(np.nan_to_num(precision[has_images]).mean()) if has_images.any() else 0.0,
        "recall_macro": float(recall[has_images].mean()) if has_images.any() else 0.0,
        "exact_match": float((truth == said).all(axis=1).mean()),
        "loss": predictions.loss,
        "num_samples": len(truth),
        "classes_not_judged": [
            name for name, has in zip(classes, has_images.tolist(), strict=True) if not has
        ],
    }
    scores = predictions.logits.double().numpy()
    exact = (truth == said).all(axis=1).astype(np.float64)
    intervals = resample(
        len(truth),
        {
            "map": lambda weights: _weigh_precision(scores, truth, weights),
            "f1_micro": lambda weights: _weigh_micro(truth, said, weights),
            "f1_macro": lambda weights: _mean(_weigh_f1(truth, said, weights)),
            "exact_match": lambda weights: weights @ exact / len(exact),
        },
    )
    return metrics | {"intervals": intervals}


def _precision_and_recall(truth: Bools, said: Bools) -> tuple[Floats, Floats]:
    """Return precision and recall of each class, (K,) each; NaN where nothing was said, or there are none."""
    hits = (truth & said).sum(axis=0)
    with np.errstate(invalid="ignore"):
        return hits / said.sum(axis=0), hits / truth.sum(axis=0)


def _weigh_micro(truth: Bools, said: Bools, weights: Weights) -> Floats:
    """Return F1 over all decisions, (R,); 1 where no image has a class and none was said."""
    hits, total = weights @ (truth & said).sum(axis=1), weights @ (truth.sum(axis=1) + said.sum(axis=1))
    return np.where(total > 0, 2 * hits / np.maximum(total, 1), 1.0)


def _weigh_f1(truth: Bools, said: Bools, weights: Weights) -> Floats:
    """Return F1 of each class, (R, K); NaN for a class without images."""
    hits, support = weights @ (truth & said), weights @ truth.astype(np.float64)
    values = 2 * hits / np.maximum(support + weights @ said.astype(np.float64), 1e-12)
    return np.where(support > 0, values, np.nan)


def _weigh_precision(scores: Floats, truth: Bools, weights: Weights) -> Floats:
    """Return the mean average precision of each row of weights, (R,), over the classes that it has."""
    return _mean(
        np.stack([_weigh_one(scores[:, k], truth[:, k], weights) for k in range(scores.shape[1])], axis=1)
    )


def _weigh_one(scores: Floats, truth: Bools, weights: Weights) -> Floats:
    """Return the average precision of one class, (R,), as scikit-learn weighs images."""
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # equal scores count together
    drawn = weights[:, order]
    hits, total = (drawn * truth[order]).cumsum(axis=1)[:, ends], drawn.cumsum(axis=1)[:, ends]
    gained = np.diff(hits, axis=1, prepend=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(total > 0, hits / total, 0.0)
        area: Floats = (gained * precision).sum(axis=1) / hits[:, -1]
    return area


def _mean(values: Floats) -> Floats:
    """Return the mean over classes of each row, without those that are NaN; NaN where all are."""
    known = ~np.isnan(values)
    number = known.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return np.where(number > 0, np.where(known, values, 0).sum(axis=1) / number, np.nan)


# --- tables --------------------------------------------------------------------------------------


def _list_predictions(
    images: Sequence[EvaluatedImage], predictions: Predictions, classes: Sequence[str]
) -> Iterator[tuple[Sequence[str], Sequence[float]]]:
    assert isinstance(predictions.target, MultiLabel)
    probabilities = predictions.probabilities
    decided = predictions.target.decide(probabilities)
    for image, values, said in zip(images, probabilities, decided, strict=True):
        names = SEPARATOR.join(
            name for name, is_named in zip(classes, said.tolist(), strict=True) if is_named
        )
        yield (*image, names), values.tolist()


def _list_by_class(predictions: Predictions, classes: Sequence[str]) -> list[tuple[Any, ...]]:
    assert isinstance(predictions.target, MultiLabel)
    probabilities = predictions.probabilities
    truth, said = predictions.labels.numpy() > 0, predictions.target.decide(probabilities).numpy()
    precision, recall = _precision_and_recall(truth, said)
    columns = [
        average_precisions(predictions.logits, predictions.labels).numpy(),
        precision,
        recall,
        _weigh_f1(truth, said, np.ones((1, len(truth))))[0],
    ]
    cells = [[UNKNOWN if np.isnan(value) else value for value in column.tolist()] for column in columns]
    errors = [_calibration_error(probabilities[:, k].numpy(), truth[:, k]) for k in range(len(classes))]
    thresholds = predictions.target.thresholds or [0.5] * len(classes)
    counts = truth.sum(axis=0).tolist(), said.sum(axis=0).tolist()
    return list(zip(classes, *cells, *counts, thresholds, errors, strict=True))


def _calibration_error(probabilities: Floats, truth: Bools) -> float:
    """Return the expected calibration error of one class: its probability against its share, in bins."""
    bins = np.minimum((probabilities * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    gaps = [
        abs(probabilities[inside].mean() - truth[inside].mean()) * inside.mean()
        for number in range(NUM_BINS)
        if (inside := bins == number).any()
    ]
    return float(sum(gaps))
