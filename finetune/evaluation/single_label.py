"""The metrics, calibration, thresholds and tables of one class an image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.evaluation.calibration import calibrate, find_thresholds
from finetune.evaluation.intervals import compute_intervals
from finetune.evaluation.metrics import compute_confusion, compute_metrics, list_by_class
from finetune.evaluation.predictions import Predictions
from finetune.evaluation.resampling import Floats, Weights
from finetune.evaluation.tables import EvaluatedImage, LabelIssue, Summary, write_predictions
from finetune.runs.files import write_csv
from finetune.runs.folder import RunFolder
from finetune.targets import (
    CLASS_METRICS,
    PREDICTION_COLUMNS,
    decide,
    decide_with_confidence,
    name_probabilities,
)

WANTED_PRECISIONS = (0.9, 0.95, 0.99)
"""Precisions for which a confidence threshold is chosen; images below it are left to a person."""
PROBABILITY_COLUMNS = ("label_probability", "suggested_probability")
_ROUNDING = 1e-6
"""Tolerance below a threshold, since probabilities are float32."""


class SingleLabelJudge:
    """Judges one class an image (:class:`finetune.evaluation.summary.Judge`)."""

    issue_columns = PROBABILITY_COLUMNS

    def summarize(self, evaluated: Predictions, val: Predictions | None, classes: Sequence[str]) -> Summary:
        """Return all metrics, with a temperature fitted on validation images."""
        calibration = calibrate(evaluated, val)
        predictions = evaluated.apply_temperature(calibration.temperature)
        fitting = predictions if val is None else val.apply_temperature(calibration.temperature)
        metrics = self.measure(evaluated, classes) | {
            "calibration": calibration.facts,
            "reject": find_thresholds(fitting, predictions, WANTED_PRECISIONS),
        }
        return Summary(predictions, calibration.temperature, metrics, evaluated.target)

    def measure(self, predictions: Predictions, classes: Sequence[str]) -> dict[str, Any]:
        """Return the metrics and their intervals."""
        intervals = {name: list(limits) for name, limits in compute_intervals(predictions).items()}
        return compute_metrics(predictions, classes) | {"intervals": intervals}

    def write_tables(
        self,
        folder: RunFolder,
        images: Sequence[EvaluatedImage],
        predictions: Predictions,
        classes: Sequence[str],
    ) -> None:
        """Write ``predictions.csv``, ``per_class.csv`` and ``confusion_matrix.csv``."""
        columns = (*PREDICTION_COLUMNS, *name_probabilities(classes))
        write_predictions(folder, columns, _list_predictions(images, predictions, classes))
        confusion = compute_confusion(predictions)
        table = [(name, *counts) for name, counts in zip(classes, confusion.tolist(), strict=True)]
        write_csv(folder.confusion_matrix, table, ("label", *classes))
        write_csv(folder.per_class, list_by_class(predictions, classes), ("label", *CLASS_METRICS))

    def weigh_score(self, values: Floats, labels: Tensor) -> Callable[[Weights], Floats]:
        """Return the accuracy as a function of weights."""
        hits = (decide(torch.from_numpy(values)) == labels).double().numpy()
        return lambda weights: weights @ hits / weights.sum(axis=1)

    def find_issues(self, predictions: Predictions, classes: Sequence[str]) -> list[LabelIssue]:
        """Return the suspected labels, each with the most probable class."""
        labels, probabilities = predictions.labels, predictions.probabilities
        issues = []
        for place in find_label_issues(labels, probabilities).tolist():
            suggested = int(decide(probabilities[place : place + 1]))
            values = (probabilities[place, labels[place]].item(), probabilities[place, suggested].item())
            captions = (f": {values[0]:.3f}", f": {values[1]:.3f}")
            issues.append(LabelIssue(place, classes[suggested], values, captions))
        return issues

    def describe(self, metrics: Mapping[str, Any]) -> str:
        """Return accuracy with its interval, balanced accuracy and macro F1."""
        low, high = metrics["intervals"]["accuracy"]
        return (
            f"accuracy {metrics['accuracy']:.4f} (95 % interval {low:.3f} to {high:.3f}), balanced "
            f"{metrics['balanced_accuracy']:.4f}, macro F1 {metrics['f1_macro']:.4f}"
        )


def _list_predictions(
    images: Sequence[EvaluatedImage], predictions: Predictions, classes: Sequence[str]
) -> Iterator[tuple[Sequence[str], Sequence[float]]]:
    probabilities = predictions.probabilities
    decided = decide_with_confidence(probabilities)
    for image, values, confidence, predicted in zip(images, probabilities, *decided, strict=True):
        yield (*image, classes[int(predicted)]), (confidence.item(), *values.tolist())


# --- wrong labels --------------------------------------------------------------------------------


def find_label_issues(labels: Tensor, probabilities: Tensor) -> Tensor:
    """Return the indices of the images with suspected labels, the least probable label first, (M,) int64.

    Args:
        labels: (N,) int64, the given labels.
        probabilities: (N, K), each row by a classifier that was not trained on the image.
    """
    most_probable = decide(probabilities)
    reached = probabilities >= compute_thresholds(labels, probabilities) - _ROUNDING
    number = reached.sum(dim=1)
    # If several thresholds are reached, the most probable class counts, as in the paper.
    guess = torch.where(number > 1, most_probable, decide(reached.int()))
    issues = ((number > 0) & (guess != labels) & (most_probable != labels)).nonzero().flatten()
    own = probabilities[issues, labels[issues]]
    return issues[own.argsort(stable=True)]


def compute_thresholds(labels: Tensor, probabilities: Tensor) -> Tensor:
    """Return the mean probability of each class over the images with its label, (K,); infinite if none."""
    num_classes = probabilities.shape[1]
    own = probabilities.gather(1, labels[:, None]).flatten().double()
    sums = torch.zeros(num_classes, dtype=torch.float64).index_add_(0, labels, own)
    counts = labels.bincount(minlength=num_classes)
    return torch.where(counts > 0, sums / counts, torch.inf)
