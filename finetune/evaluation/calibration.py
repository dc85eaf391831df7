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
"""Folds into which images are divided that must both fit a temperature and measure its effect."""
COLDEST, HOTTEST = 0.05, 20.0
_MOST_STEPS = 60
_CLOSE = 1e-9
"""Relative change of the temperature at which the fit has converged."""
ONE_SIDED = 1.644854
"""Quantile of the normal distribution that 95 % lie below."""


@dataclass(frozen=True)
class Reliability:
    """Confidence compared with accuracy, in bins.

    Attributes:
        ece: expected calibration error in [0, 1]: the mean distance between confidence and accuracy in a
            bin, weighted by its images.
        bins: each with ``low``, ``high``, ``count``, and the means ``confidence`` and ``accuracy`` (null in
            an empty one).
    """

    ece: float
    bins: list[dict[str, float | int | None]]


def measure_reliability(predictions: Predictions) -> Reliability:
    """Return how well the confidences match the accuracies."""
    confidence, right = _confidence_and_truth(predictions)
    edges = np.linspace(0, 1, NUM_BINS + 1)
    place = np.clip(np.digitize(confidence, edges[1:-1], right=True), 0, NUM_BINS - 1)
    bins: list[dict[str, float | int | None]] = []
    error = 0.0
    for number in range(NUM_BINS):
        inside = place == number
        count = int(inside.sum())
        claimed = float(confidence[inside].mean()) if count else None
        true = float(right[inside].mean()) if count else None
        if claimed is not None and true is not None:
            error += count / len(right) * abs(claimed - true)
        bins.append(
            {
                "low": float(edges[number]),
                "high": float(edges[number + 1]),
                "count": count,
                "confidence": claimed,
                "accuracy": true,
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
    own = logits.gather(1, labels[:, None]).mean()
    wanted = float((num_images * own + logits.mean()) / (num_images + 1))
    low, high, sharpness = 1 / HOTTEST, 1 / COLDEST, 1.0
    for _ in range(_MOST_STEPS):
        weighed = to_probabilities(sharpness * logits) * logits
        mean = weighed.sum(dim=1)
        slope = float(mean.mean()) - wanted
        bend = float(((weighed * logits).sum(dim=1) - mean**2).mean())
        low, high = (sharpness, high) if slope < 0 else (low, sharpness)
        step = sharpness - slope / bend if bend > 0 else low
        after = step if low < step < high else math.sqrt(low * high)
        if abs(after / sharpness - 1) < _CLOSE:
            break
        sharpness = after
    return 1 / sharpness


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
    """Deal the images of each class to the folds in turn, in an order with a fixed seed, (N,) int64."""
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
        temperature: 1 where no temperature lowers the loss of images that did not fit it.
        facts: the content of ``calibration`` in ``metrics.json``.
    """

    temperature: float
    facts: dict[str, Any]


def calibrate(evaluated: Predictions, val: Predictions | None) -> Calibration:
    """Fit a temperature on validation images, and measure calibration on the scored images.

    Args:
        scored: uncalibrated predictions of the images that the metrics are computed on.
        val: uncalibrated predictions of the validation images; None where these are the scored images.
    """
    fitting = evaluated if val is None else val
    apart = calibrate_cross_fitted(fitting)
    temperature = fit_temperature(fitting) if apart.loss < fitting.loss else 1.0
    after = evaluated.apply_temperature(temperature)
    if val is None and temperature != 1.0:
        after = apart
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


# --- thresholds of confidence under which a person should decide -----------------------------------


def find_thresholds(
    fitting: Predictions, evaluated: Predictions, wanted: Sequence[float]
) -> list[dict[str, Any]]:
    """Return the confidences above which predictions reach the wanted precisions.

    Args:
        fitting: calibrated validation predictions, on which the thresholds are chosen.
        scored: calibrated predictions, on which the effect of the thresholds is measured.
        wanted: precisions in (0, 1).

    Returns:
        The rows of :func:`measure_thresholds`; a threshold is None where no confidence reaches the precision.
    """
    confidence, right = _confidence_and_truth(fitting)
    found = []
    for precision in wanted:
        threshold = find_threshold(confidence, right, precision)
        kept = right[confidence >= threshold] if threshold is not None else right[:0]
        low = compute_wilson(int(kept.sum()), len(kept), ONE_SIDED)[0] if len(kept) else None
        found.append({"precision": precision, "threshold": threshold, "num_images": len(kept), "low": low})
    return measure_thresholds(found, evaluated)


def measure_thresholds(
    thresholds: Sequence[Mapping[str, Any]], evaluated: Predictions
) -> list[dict[str, Any]]:
    """Return the coverage and the precision of thresholds on scored images.

    Args:
        thresholds: each with ``precision`` (wanted), ``threshold``, ``num_images`` (kept ones of the images
            that chose it) and ``low`` (lower 95 % confidence limit of their precision).
        scored: calibrated predictions.

    Returns:
        For each threshold these four values, ``coverage`` (fraction of images that is kept) and ``achieved``
        (precision of the kept ones; null where all are rejected).
    """
    confidence, right = _confidence_and_truth(evaluated)
    rows = []
    for row in thresholds:
        threshold = row["threshold"]
        kept = confidence >= (threshold if threshold is not None else np.inf)
        rows.append(
            {
                **row,
                "coverage": float(kept.mean()),
                "achieved": float(right[kept].mean()) if kept.any() else None,
            }
        )
    return rows


def find_threshold(
    confidence: npt.NDArray[np.float64], right: npt.NDArray[np.bool_], precision: float
) -> float | None:
    """Return the lowest confidence above which the precision is at least the wanted one; None if there is
    none.

    It lies midway between two images, so that rounding moves neither across it; 0 keeps all images.
    """
    order = np.argsort(-confidence, kind="stable")
    share = right[order].cumsum() / np.arange(1, len(order) + 1)
    sure = confidence[order]
    is_last = np.append(sure[1:] != sure[:-1], True)  # equals are kept or rejected together
    enough = np.flatnonzero((share >= precision) & is_last)
    if not len(enough):
        return None
    last = enough[-1]
    return float(sure[last] + sure[last + 1]) / 2 if last + 1 < len(sure) else 0.0


def _confidence_and_truth(
    predictions: Predictions,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    confidence, predicted = decide_with_confidence(predictions.probabilities)
    return confidence.double().numpy(), (predicted == predictions.labels).numpy()
