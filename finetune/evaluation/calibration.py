"""Do images that are called "90 % sure" turn out right in 90 % of cases? Measured, and mended.

Temperature scaling (Guo et al., 2017, arXiv:1706.04599): logits are divided by one number before they become
probabilities. No prediction changes, only how sure it is.

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
"""Of equal width, as in the paper."""
NUM_PARTS = 5
"""Into which images are divided that must both fit a temperature and judge it."""
COLDEST, HOTTEST = 0.05, 20.0
_MOST_STEPS = 60
_CLOSE = 1e-9
"""Share of a temperature."""
ONE_SIDED = 1.644854
"""Quantile of the normal distribution that 95 % lie below."""


@dataclass(frozen=True)
class Reliability:
    """Confidence against truth.

    Attributes:
        ece: expected calibration error in [0, 1]: the mean distance between confidence and accuracy in a
            bin, weighted by its images.
        bins: each with ``low``, ``high``, ``count``, and the means ``confidence`` and ``accuracy`` (null in
            an empty one).
    """

    ece: float
    bins: list[dict[str, float | int | None]]


def measure_reliability(predictions: Predictions) -> Reliability:
    """Return how well confidences fit."""
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
    """Return the temperature under which the labels are likeliest.

    One image more than there are is assumed, whose label could be any: without it, a network that is right
    everywhere would be called infinitely sure. The loss is convex in 1/T: Newton's steps, kept in bounds.
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


def calibrate_apart(predictions: Predictions) -> Predictions:
    """Return predictions whose every image was softened by a temperature that others fitted.

    So the images that fit a temperature can also say what it is worth.
    """
    parts = _draw_parts(predictions.labels)
    logits = predictions.logits.clone()
    for part in range(NUM_PARTS):
        inside, others = parts == part, parts != part
        if inside.any() and others.any():
            result = fit_temperature(Predictions(predictions.logits[others], predictions.labels[others]))
            logits[inside] /= result
    return Predictions(logits, predictions.labels)


def _draw_parts(labels: Tensor) -> Tensor:
    """Give the images of each class to the parts in turns, in an order drawn once and for all."""
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(len(labels), generator=generator)
    order = shuffled[torch.argsort(labels[shuffled], stable=True)]
    parts = torch.empty(len(labels), dtype=torch.int64)
    parts[order] = torch.arange(len(labels)) % NUM_PARTS
    return parts


@dataclass(frozen=True)
class Calibration:
    """A temperature, and what it is worth.

    Attributes:
        temperature: 1 where none made images that did not fit it any likelier.
        facts: the content of ``calibration`` in ``metrics.json``.
    """

    temperature: float
    facts: dict[str, Any]


def calibrate(judged: Predictions, val: Predictions | None) -> Calibration:
    """Fit a temperature on validation images, and measure calibration on the judged ones.

    Args:
        judged: uncalibrated.
        val: uncalibrated; None where the judged images are the validation images.
    """
    fitting = judged if val is None else val
    apart = calibrate_apart(fitting)
    temperature = fit_temperature(fitting) if apart.loss < fitting.loss else 1.0
    after = judged.soften(temperature)
    if val is None and temperature != 1.0:
        after = apart
    facts = {"temperature": temperature, "fitted_on": "val", "same_images": val is None}
    return Calibration(temperature, facts | compare_calibration(judged, after))


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


# --- what to leave to a person --------------------------------------------------------------------


def find_thresholds(
    fitting: Predictions, judged: Predictions, wanted: Sequence[float]
) -> list[dict[str, Any]]:
    """Return from which confidence on predictions are right as often as wanted.

    Args:
        fitting: validation predictions, calibrated; thresholds are chosen on them.
        judged: predictions, calibrated, which say what a threshold gives.
        wanted: precisions in (0, 1).

    Returns:
        What :func:`measure_thresholds` does; a threshold is None where none is enough.
    """
    confidence, right = _confidence_and_truth(fitting)
    found = []
    for precision in wanted:
        threshold = find_threshold(confidence, right, precision)
        kept = right[confidence >= threshold] if threshold is not None else right[:0]
        low = compute_wilson(int(kept.sum()), len(kept), ONE_SIDED)[0] if len(kept) else None
        found.append({"precision": precision, "threshold": threshold, "num_images": len(kept), "low": low})
    return measure_thresholds(found, judged)


def measure_thresholds(thresholds: Sequence[Mapping[str, Any]], judged: Predictions) -> list[dict[str, Any]]:
    """Return what thresholds give on judged images.

    Args:
        thresholds: each with ``precision`` (wanted) and ``threshold``, ``num_images`` (that it keeps of those
            that chose it) and ``low`` (what the share of right ones among them proves, with 95 %).
        judged: predictions, calibrated.

    Returns:
        For each these four, ``coverage`` (share of images that is not rejected) and ``achieved`` (share of
        those that is right; null where all are rejected).
    """
    confidence, right = _confidence_and_truth(judged)
    rows = []
    for one in thresholds:
        threshold = one["threshold"]
        kept = confidence >= (threshold if threshold is not None else np.inf)
        rows.append(
            {
                **one,
                "coverage": float(kept.mean()),
                "achieved": float(right[kept].mean()) if kept.any() else None,
            }
        )
    return rows


def find_threshold(
    confidence: npt.NDArray[np.float64], right: npt.NDArray[np.bool_], precision: float
) -> float | None:
    """Return a confidence from which on the share of right predictions is at least so high: the lowest.

    It lies in the middle between two images, so that rounding moves neither across; 0 rejects none.
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
