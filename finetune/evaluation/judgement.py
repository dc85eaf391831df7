"""Everything that predictions say, in one place: figures, their intervals, how sure they may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.evaluation.calibration import calibrate, find_thresholds
from finetune.evaluation.intervals import compute_intervals
from finetune.evaluation.metrics import compute_metrics
from finetune.evaluation.predict import Predictions

WANTED_PRECISIONS = (0.9, 0.95, 0.99)
"""For which a threshold is looked for, under which a picture had better go to a person."""


@dataclass(frozen=True)
class Judgement:
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


def judge(judged: Predictions, val: Predictions | None, classes: Sequence[str]) -> Judgement:
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
    return Judgement(predictions, calibration.temperature, metrics)
