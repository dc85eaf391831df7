"""What a run reports about its predictions: metrics, intervals, calibration, thresholds and tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.data.dataset import Sample
from finetune.evaluation.calibration import calibrate, find_thresholds
from finetune.evaluation.intervals import compute_intervals
from finetune.evaluation.metrics import compute_confusion, compute_metrics, list_by_class
from finetune.evaluation.predictions import Predictions
from finetune.runs.files import FLOAT_FORMAT, escape_formula, format_csv_line, write_chunks, write_csv
from finetune.runs.folder import RunFolder
from finetune.targets import (
    CLASS_METRICS,
    PREDICTION_COLUMNS,
    decide_with_confidence,
    name_probabilities,
)

WANTED_PRECISIONS = (0.9, 0.95, 0.99)
"""Precisions for which a confidence threshold is chosen; images below it are left to a person."""


@dataclass(frozen=True)
class Summary:
    """The metrics of evaluated images.

    Attributes:
        predictions: the predictions after calibration.
        temperature: the temperature that calibrated them.
        metrics: content for ``metrics.json``. Only those under ``calibration`` and ``reject`` depend on the
            temperature; ``loss`` is that of the network as it was trained.
    """

    predictions: Predictions
    temperature: float
    metrics: dict[str, Any]


def summarize(evaluated: Predictions, val: Predictions | None, classes: Sequence[str]) -> Summary:
    """Compute all metrics of a network from its predictions.

    Args:
        evaluated: uncalibrated predictions of the evaluated images.
        val: uncalibrated predictions of the validation images; None if these are the evaluated images.
        classes: class names in index order.
    """
    calibration = calibrate(evaluated, val)
    predictions = evaluated.apply_temperature(calibration.temperature)
    fitting = predictions if val is None else val.apply_temperature(calibration.temperature)
    metrics = compute_metrics(evaluated, classes) | {
        "intervals": {name: list(limits) for name, limits in compute_intervals(evaluated).items()},
        "calibration": calibration.facts,
        "reject": find_thresholds(fitting, predictions, WANTED_PRECISIONS),
    }
    return Summary(predictions, calibration.temperature, metrics)


def write_metrics_tables(
    folder: RunFolder, samples: Sequence[Sample], predictions: Predictions, classes: Sequence[str]
) -> None:
    """Write ``predictions.csv``, ``per_class.csv`` and ``confusion_matrix.csv``.

    Args:
        folder: the run folder.
        samples: the evaluated images, in the order of the predictions.
        predictions: calibrated predictions.
        classes: class names in index order.
    """
    write_chunks(folder.predictions, _prediction_lines(samples, predictions, classes))
    confusion = compute_confusion(predictions)
    table = [(name, *counts) for name, counts in zip(classes, confusion.tolist(), strict=True)]
    write_csv(folder.confusion_matrix, table, ("label", *classes))
    write_csv(folder.per_class, list_by_class(predictions, classes), ("label", *CLASS_METRICS))


def _prediction_lines(
    samples: Sequence[Sample], predictions: Predictions, classes: Sequence[str]
) -> Iterator[bytes]:
    """Yield the lines of ``predictions.csv``; one format string for all numbers of a row is fastest."""
    columns = (*PREDICTION_COLUMNS, *name_probabilities(classes))
    yield format_csv_line([escape_formula(column) for column in columns]).encode()
    numbers = f",{FLOAT_FORMAT}" * (1 + len(classes)) + "\n"
    probabilities = predictions.probabilities
    decided = decide_with_confidence(probabilities)
    for sample, values, confidence, predicted in zip(samples, probabilities, *decided, strict=True):
        texts = (sample.path, classes[sample.label], classes[int(predicted)])
        names = format_csv_line([escape_formula(text) for text in texts]).removesuffix("\n")
        yield (names + numbers % (confidence.item(), *values.tolist())).encode()
