"""95 % intervals of metrics: how much they would vary over other test images of the same kind.

Percentile bootstrap (Efron, 1979): the evaluated images are drawn many times with replacement, and the
interval of a metric spans the middle 95 % of its values. Where nearly all predictions are right or wrong, or
a class has few images, resampling underestimates the spread. The interval of a proportion is therefore at
least as wide as Wilson's (1927), and that of a mean of proportions at least as wide as the combination of the
intervals of the classes (MOVER; Zou and Donner, 2008).

Shape legend: N images, K classes, R resamples.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from finetune.evaluation.metrics import Counts, Floats, compute_confusion
from finetune.evaluation.predictions import Predictions
from finetune.targets import TOP5_CLASSES, compute_log_odds, compute_losses, find_in_top_k

LEVEL = 0.95
NUM_RESAMPLES = 2_000
_FEWEST_RESAMPLES = 200
_MOST_NUMBERS = 500_000_000
"""Limit of resamples x images x classes for the area under the ROC curve; it takes some seconds."""
_CHUNK = 10_000_000
"""Random numbers that are drawn at a time."""

Interval = tuple[float, float]


def compute_intervals(predictions: Predictions, seed: int = 0) -> dict[str, Interval]:
    """Return the 95 % interval of each headline metric, by its name in ``metrics.json``.

    A metric with the same value in every resample has no interval, since its spread is unknown. The area
    under the ROC curve has none where images times classes exceed some millions.

    Args:
        predictions: predictions of at least one image.
        seed: seed of the resampling.
    """
    rng = np.random.default_rng(seed)
    intervals = _share_intervals(compute_confusion(predictions), rng)
    losses = compute_losses(predictions.logits, predictions.labels)
    intervals["loss"] = _middle(_resample_mean(losses.numpy(), rng))
    if predictions.logits.shape[1] >= TOP5_CLASSES:
        top5 = find_in_top_k(predictions.logits, predictions.labels, 5).double().numpy()
        resampled = _middle(_resample_mean(top5, rng))
        intervals["top5_accuracy"] = _join(resampled, compute_wilson(int(top5.sum()), len(top5)))
    areas = _resample_roc_auc(predictions, rng)
    if len(areas):
        intervals["roc_auc"] = _middle(areas)
    return {name: limits for name, limits in intervals.items() if limits[0] < limits[1]}


def _share_intervals(confusion: Counts, rng: np.random.Generator) -> dict[str, Interval]:
    """Return intervals of accuracy, balanced accuracy and macro F1.

    The cells of the confusion matrix are resampled: that equals resampling images, and is much faster.
    """
    hits, support = confusion.diagonal(), confusion.sum(axis=1)
    intervals = {name: _middle(values) for name, values in _resample_shares(confusion, rng).items()}
    mean = _combine(hits[support > 0], support[support > 0])
    together = compute_wilson(int(hits.sum()), int(support.sum()))
    intervals["accuracy"] = _join(intervals["accuracy"], together)
    intervals["balanced_accuracy"] = _join(intervals["balanced_accuracy"], mean)
    low, high = intervals["f1_macro"]
    if low == high:  # all images are right, or none: F1 equals recall then
        intervals["f1_macro"] = mean
    return intervals


def compute_wilson(hits: int, number: int, quantile: float = 1.959964) -> Interval:
    """Return Wilson's interval of a proportion (1927), which has a width even at 0 and 1.

    Args:
        hits: number of successes.
        number: number of trials, at least one.
        quantile: quantile of the normal distribution; the default gives a two-sided 95 % interval.
    """
    share, square = hits / number, quantile**2
    centre = (share + square / (2 * number)) / (1 + square / number)
    margin = quantile * np.sqrt(share * (1 - share) / number + square / (4 * number**2))
    margin /= 1 + square / number
    return max(0.0, float(centre - margin)), min(1.0, float(centre + margin))


def _combine(hits: Counts, support: Counts) -> Interval:
    """Return the interval of the mean of several proportions, from the interval of each (MOVER)."""
    shares = hits / support
    limits = np.array([compute_wilson(int(h), int(n)) for h, n in zip(hits, support, strict=True)])
    below, above = np.sqrt(((limits - shares[:, None]) ** 2).sum(axis=0)) / len(shares)
    mean = float(shares.mean())
    return max(0.0, mean - float(below)), min(1.0, mean + float(above))


def _join(first: Interval, second: Interval) -> Interval:
    """Return the smallest interval that contains both."""
    return min(first[0], second[0]), max(first[1], second[1])


def _resample_shares(confusion: Counts, rng: np.random.Generator) -> dict[str, Floats]:
    """Return the values (R,) of each metric; the means of a resample leave out classes without images."""
    rows, columns = np.nonzero(confusion)
    num_images, diagonal = int(confusion.sum()), rows == columns
    draws = rng.multinomial(num_images, confusion[rows, columns] / num_images, size=NUM_RESAMPLES)
    support = _sum_by(draws, rows, len(confusion))
    hits = _sum_by(draws[:, diagonal], rows[diagonal], len(confusion))
    is_there = support > 0
    recall = hits / np.maximum(support, 1)
    f1 = 2 * hits / np.maximum(support + _sum_by(draws, columns, len(confusion)), 1)
    return {
        "accuracy": hits.sum(axis=1) / num_images,
        "balanced_accuracy": recall.sum(axis=1) / is_there.sum(axis=1),
        "f1_macro": np.where(is_there, f1, 0).sum(axis=1) / is_there.sum(axis=1),
    }


def _sum_by(draws: Counts, keys: Counts, num_keys: int) -> Counts:
    """Return sums (R, num_keys) of the columns of draws that have the same key."""
    sums = np.zeros((len(draws), num_keys), np.int64)
    order = np.argsort(keys, kind="stable")
    if len(order):
        present, starts = np.unique(keys[order], return_index=True)
        sums[:, present] = np.add.reduceat(draws[:, order], starts, axis=1)
    return sums


def _resample_mean(values: Floats, rng: np.random.Generator) -> Floats:
    """Return means (R,) of values (N,) that are drawn with replacement."""
    rows = max(1, min(NUM_RESAMPLES, _CHUNK // len(values)))
    parts = [
        values[rng.integers(len(values), size=(min(rows, NUM_RESAMPLES - start), len(values)))].mean(axis=1)
        for start in range(0, NUM_RESAMPLES, rows)
    ]
    return np.concatenate(parts)


def _resample_roc_auc(predictions: Predictions, rng: np.random.Generator) -> Floats:
    """Return areas (R,), or an empty array where they would take too long.

    An image that is drawn twice gets the weight 2, so that the scores are sorted only once.
    """
    labels, num_images = predictions.labels.numpy(), len(predictions.labels)
    present = np.unique(labels)
    num_resamples = min(NUM_RESAMPLES, _MOST_NUMBERS // (num_images * len(present)))
    if len(present) < 2 or num_resamples < _FEWEST_RESAMPLES:
        return np.empty(0)
    scores = compute_log_odds(predictions.logits)
    even = np.full(num_images, 1 / num_images)
    rows = max(1, _CHUNK // num_images)
    parts = []
    for start in range(0, num_resamples, rows):
        weights = rng.multinomial(num_images, even, size=min(rows, num_resamples - start))
        areas = np.stack([_weigh_area(scores[:, label], labels == label, weights) for label in present])
        is_there = ~np.isnan(areas)  # a draw may leave classes out
        usable = is_there.any(axis=0)
        parts.append(np.nanmean(areas[:, usable], axis=0))
    return np.concatenate(parts)


def _weigh_area(scores: Floats, is_own: npt.NDArray[np.bool_], weights: Counts) -> Floats:
    """Return the area under one ROC curve for each row of weights (R, N); NaN where a side is empty."""
    order = np.argsort(scores, kind="stable")
    _, starts = np.unique(scores[order], return_index=True)  # equal scores count as half
    drawn, own = weights[:, order], is_own[order]
    positive = np.add.reduceat(drawn * own, starts, axis=1)
    negative = np.add.reduceat(drawn * ~own, starts, axis=1)
    below = negative.cumsum(axis=1) - negative / 2
    with np.errstate(invalid="ignore"):
        area: Floats = (positive * below).sum(axis=1) / (positive.sum(axis=1) * negative.sum(axis=1))
    return area


def _middle(values: Floats) -> Interval:
    """Return the limits of the middle 95 % of values (R,)."""
    low, high = np.quantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)
