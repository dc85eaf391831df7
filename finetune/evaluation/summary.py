"""Everything that predictions say, in one place: figures, their intervals, how sure they may be."""

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
"""For which a threshold is looked for, under which an image had better go to a person."""


@dataclass(frozen=True)
class Summary:
    """What judged images gave.

    Attributes:
        predictions: calibrated.
        temperature: that calibrated them.
        metrics: for ``metrics.json``; figures but those under ``calibration`` and ``reject`` do not depend on
            the temperature, ``loss`` is that of the network as it was trained.
    """

    predictions: Predictions
    temperature: float
    metrics: dict[str, Any]


def summarize(judged: Predictions, val: Predictions | None, classes: Sequence[str]) -> Summary:
    """Judge a network by its predictions.

    Args:
        judged: uncalibrated.
        val: uncalibrated predictions of the validation part; None where that is the judged part.
        classes: names in index order.
    """
    calibration = calibrate(judged, val)
    predictions = judged.soften(calibration.temperature)
    fitting = predictions if val is None else val.soften(calibration.temperature)
    metrics = compute_metrics(judged, classes) | {
        "intervals": {name: list(limits) for name, limits in compute_intervals(judged).items()},
        "calibration": calibration.facts,
        "reject": find_thresholds(fitting, predictions, WANTED_PRECISIONS),
    }
    return Summary(predictions, calibration.temperature, metrics)


def write_figures(
    folder: RunFolder, samples: Sequence[Sample], predictions: Predictions, classes: Sequence[str]
) -> None:
    """Write one row an image, one row a class, and the confusion matrix.

    Args:
        folder: takes the files.
        samples: that were judged, in the order of the predictions.
        predictions: calibrated.
        classes: names in index order.
    """
    write_chunks(folder.predictions, _prediction_lines(samples, predictions, classes))
    confusion = compute_confusion(predictions)
    table = [(name, *counts) for name, counts in zip(classes, confusion.tolist(), strict=True)]
    write_csv(folder.confusion_matrix, table, ("label", *classes))
    write_csv(folder.per_class, list_by_class(predictions, classes), ("label", *CLASS_METRICS))


def _prediction_lines(
    samples: Sequence[Sample], predictions: Predictions, classes: Sequence[str]
) -> Iterator[bytes]:
    """Yield the lines of ``predictions.csv``: one template for all numbers of a row, perhaps thousands."""
    columns = (*PREDICTION_COLUMNS, *name_probabilities(classes))
    yield format_csv_line([escape_formula(column) for column in columns]).encode()
    numbers = f",{FLOAT_FORMAT}" * (1 + len(classes)) + "\n"
    probabilities = predictions.probabilities
    decided = decide_with_confidence(probabilities)
    for sample, values, confidence, predicted in zip(samples, probabilities, *decided, strict=True):
        texts = (sample.path, classes[sample.label], classes[int(predicted)])
        who = format_csv_line([escape_formula(text) for text in texts]).removesuffix("\n")
        yield (who + numbers % (confidence.item(), *values.tolist())).encode()
