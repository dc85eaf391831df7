"""Calibration: whether predictions with a confidence of 90 % are right in 90 % of cases; measured and
corrected.

Temperature scaling (Guo et al., 2017, arXiv:1706.04599) divides the logits by one number, the temperature,
before the softmax. It changes confidences, never the predicted class.

Shape legend: N images, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from finetune.evaluation.intervals import compute_wilson
from finetune.evaluation.predictions import Predictions
from finetune.targets import decide_with_confidence, to_probabilities

NUM_BINS = 15
"""Bins of confidence, of equal width, as in the paper."""
NUM_FOLDS = 5
"""Folds of the images if the same ones both fit a temperature and measure its effect."""
COLDEST, HOTTEST = 0.05, 20.0
"""Smallest and largest temperature."""
_MOST_STEPS = 60
_CLOSE = 1e-9
"""Relative change of the temperature at which the fit has converged."""
ONE_SIDED = 1.644854
"""0.95 quantile of the standard normal distribution."""


@dataclass(frozen=True)
class Reliability:
    """Confidence compared with accuracy, in bins.

    Attributes:
        ece: expected calibration error in [0, 1]: the mean distance between confidence and accuracy in a
            bin, weighted by its images.
        bins: one dict per bin with ``low``, ``high``, ``count``, and the means ``confidence`` and
            ``accuracy`` (None in an empty bin).
    """

    ece: float
    bins: list[dict[str, float | int | None]]


def measure_reliability(predictions: Predictions) -> Reliability:
    """Return how well the confidences match the accuracies."""
    confidence, correct = _confidence_and_correctness(predictions)
    edges = np.linspace(0, 1, NUM_BINS + 1)
    bin_of = np.clip(np.digitize(confidence, edges[1:-1], right=True), 0, NUM_BINS - 1)
    bins: list[dict[str, float | int | None]] = []
    error = 0.0
    for number in range(NUM_BINS):
        inside = bin_of == number
        count = int(inside.sum())
        mean_confidence = float(confidence[inside].mean()) if count else None
        accuracy = float(correct[inside].mean()) if count else None
        if mean_confidence is not None and accuracy is not None:
            error += count / len(correct) * abs(mean_confidence - accuracy)
        bins.append(
            {
                "low": float(edges[number]),
                "high": float(edges[number + 1]),
                "count": count,
                "confidence": mean_confidence,
                "accuracy": accuracy,
            }
        )
    return Reliability(error, bins)


def fit_temperature(predictions: Predictions) -> float:
    """Return the temperature that maximises the likelihood of the labels.

    One additional image with a uniform label distribution is assumed: without it, the temperature of a
    network that is always right would be 0. The loss is convex in 1/T; it is minimised by Newton steps within
    bounds.
    """
    logits, labels = predictions.logits.double(), predictions.labels
    num_images = len(labels)
    label_logit = logits.gather(1, labels[:, None]).mean()
    target = float((num_images * label_logit + logits.mean()) / (num_images + 1))
    low, high, inverse = 1 / HOTTEST, 1 / COLDEST, 1.0
    for _ in range(_MOST_STEPS):
        weighted = to_probabilities(inverse * logits) * logits
        mean = weighted.sum(dim=1)
        slope = float(mean.mean()) - target
        curvature = float(((weighted * logits).sum(dim=1) - mean**2).mean())
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        step = inverse - slope / curvature if curvature > 0 else low
        updated = step if low < step < high else math.sqrt(low * high)
        if abs(updated / inverse - 1) < _CLOSE:
            break
        inverse = updated
    return 1 / inverse


def calibrate_cross_fitted(predictions: Predictions) -> Predictions:
    """Return predictions, each calibrated with a temperature fitted on the images of the other folds.

    So the effect of a temperature can be measured on the same images that fit it.
    """
    folds = _draw_folds(predictions.labels)
    logits = predictions.logits.clone()
    for fold in range(NUM_FOLDS):
        inside, others = folds == fold, folds != fold
        if inside.any() and others.any():
            result = fit_temperature(Predictions(predictions.logits[others], predictions.labels[others]))
            logits[inside] /= result
    return Predictions(logits, predictions.labels)


def _draw_folds(labels: Tensor) -> Tensor:
    """Return the fold of each image, (N,) int64: the images of each class in turn, after a seeded shuffle."""
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(len(labels), generator=generator)
    order = shuffled[torch.argsort(labels[shuffled], stable=True)]
    folds = torch.empty(len(labels), dtype=torch.int64)
    folds[order] = torch.arange(len(labels)) % NUM_FOLDS
    return folds


@dataclass(frozen=True)
class Calibration:
    """A temperature and its effect.

    Attributes:
        temperature: the fitted temperature; 1 if it does not lower the loss of images that did not fit it.
        facts: the content of ``calibration`` in ``metrics.json``.
    """

    temperature: float
    facts: dict[str, Any]


def calibrate(evaluated: Predictions, val: Predictions | None) -> Calibration:
    """Fit a temperature on validation images, and measure calibration on the evaluated images.

    Args:
        evaluated: uncalibrated predictions of the images that the metrics are computed on.
        val: uncalibrated predictions of the validation images; None if these are the evaluated images.
    """
    fitting = evaluated if val is None else val
    cross_fitted = calibrate_cross_fitted(fitting)
    temperature = fit_temperature(fitting) if cross_fitted.loss < fitting.loss else 1.0
    after = evaluated.apply_temperature(temperature)
    if val is None and temperature != 1.0:
        after = cross_fitted
    facts = {"temperature": temperature, "fitted_on": "val", "same_images": val is None}
    return Calibration(temperature, facts | compare_calibration(evaluated, after))


def compare_calibration(before: Predictions, after: Predictions) -> dict[str, Any]:
    """Return loss, calibration error and reliability before and after a temperature."""
    first, second = measure_reliability(before), measure_reliability(after)
    return {
        "ece": first.ece,
        "ece_calibrated": second.ece,
        "loss": before.loss,
        "loss_calibrated": after.loss,
        "bins": first.bins,
        "bins_calibrated": second.bins,
    }


# --- confidence thresholds below which a prediction is refused -----------------------------------


def find_thresholds(
    fitting: Predictions, evaluated: Predictions, wanted: Sequence[float]
) -> list[dict[str, Any]]:
    """Return the confidences above which predictions reach the wanted precisions.

    Args:
        fitting: calibrated validation predictions, on which the thresholds are chosen.
        evaluated: calibrated predictions, on which the effect of the thresholds is measured.
        wanted: precisions in (0, 1).

    Returns:
        The rows of :func:`measure_thresholds`; a threshold is None if no confidence reaches the precision.
    """
    confidence, correct = _confidence_and_correctness(fitting)
    found = []
    for precision in wanted:
        threshold = find_threshold(confidence, correct, precision)
        kept = correct[confidence >= threshold] if threshold is not None else correct[:0]
        low = compute_wilson(int(kept.sum()), len(kept), ONE_SIDED)[0] if len(kept) else None
        found.append({"precision": precision, "threshold": threshold, "num_images": len(kept), "low": low})
    return measure_thresholds(found, evaluated)


def measure_thresholds(
    thresholds: Sequence[Mapping[str, Any]], evaluated: Predictions
) -> list[dict[str, Any]]:
    """Return the coverage and the precision of thresholds on the evaluated images.

    Args:
        thresholds: each with ``precision`` (wanted), ``threshold``, ``num_images`` (number kept of the images
            that chose it) and ``low`` (lower 95 % confidence limit of their precision).
        evaluated: calibrated predictions.

    Returns:
        For each threshold these four values, ``coverage`` (fraction of images that is kept) and ``achieved``
        (precision of the kept images; None if all are rejected).
    """
    confidence, correct = _confidence_and_correctness(evaluated)
    rows = []
    for row in thresholds:
        threshold = row["threshold"]
        kept = confidence >= (threshold if threshold is not None else np.inf)
        rows.append(
            {
                **row,
                "coverage": float(kept.mean()),
                "achieved": float(correct[kept].mean()) if kept.any() else None,
            }
        )
    return rows


def find_threshold(
    confidence: npt.NDArray[np.float64], correct: npt.NDArray[np.bool_], precision: float
) -> float | None:
    """Return the lowest confidence threshold with at least the wanted precision; None if there is none.

    The threshold lies midway between the confidences of two images, so that rounding does not move either
    across it; 0 keeps all images.

    Args:
        confidence: confidences (N,) in [0, 1].
        correct: whether each prediction is correct, (N,).
        precision: wanted precision in (0, 1).
    """
    order = np.argsort(-confidence, kind="stable")
    precisions = correct[order].cumsum() / np.arange(1, len(order) + 1)
    descending = confidence[order]
    is_last = np.append(descending[1:] != descending[:-1], True)  # ties are kept or rejected together
    enough = np.flatnonzero((precisions >= precision) & is_last)
    if not len(enough):
        return None
    last = enough[-1]
    return float(descending[last] + descending[last + 1]) / 2 if last + 1 < len(descending) else 0.0


def _confidence_and_correctness(
    predictions: Predictions,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    confidence, predicted = decide_with_confidence(predictions.probabilities)
    return confidence.double().numpy(), (predicted == predictions.labels).numpy()
