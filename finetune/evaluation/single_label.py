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
from finetune.evaluation.tables import EvaluatedImage, Summary, write_predictions
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


class SingleLabelJudge:
    """Judges one class an image (:class:`finetune.evaluation.summary.Judge`)."""

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
