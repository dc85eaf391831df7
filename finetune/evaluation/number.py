"""The metrics, prediction intervals and tables of a number an image.

A prediction interval is the value plus and minus a margin: the quantile of absolute errors of validation
images that split conformal prediction takes (Lei et al., 2018, arXiv:1604.04173). It holds the stated share
of new numbers if these are like the validation images, whatever the network does.

Shape legend: N images, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.evaluation.predictions import Predictions
from finetune.evaluation.resampling import Floats, Weights, resample
from finetune.evaluation.tables import EvaluatedImage, LabelIssue, Summary, write_predictions
from finetune.runs.folder import RunFolder
from finetune.targets import Number

COVERAGE = 0.9
"""Share of new numbers that a prediction interval holds."""
NUM_FOLDS = 5
"""Folds of the images if the same ones both choose the margin and measure its coverage."""
FAR = 4.0
"""Deviations beyond which the error of a number is an outlier: 1 in 16,000 of normally distributed ones."""
_NORMAL_MAD = 0.6744897501960817
"""Median absolute deviation of the standard normal distribution."""


class NumberJudge:
    """Judges a number an image (:class:`finetune.evaluation.summary.Judge`)."""

    issue_columns = ("error", "deviations")

    def summarize(self, evaluated: Predictions, val: Predictions | None, classes: Sequence[str]) -> Summary:
        """Return all metrics, with a margin chosen on validation images."""
        assert isinstance(evaluated.target, Number)
        fitting = _errors(evaluated if val is None else val)
        margin = choose_margin(fitting)
        target = replace(evaluated.target, margin=margin)
        predictions = replace(evaluated, target=target)
        covered = (
            (_errors(evaluated) <= margin).double().mean().item()
            if val is not None and margin is not None
            else cover_cross_fitted(fitting)
        )
        facts = {"wanted": COVERAGE, "margin": margin, "covered": covered, "same_images": val is None}
        metrics = self.measure(predictions, classes) | {"prediction_interval": facts}
        return Summary(predictions, 1.0, metrics, target)

    def measure(self, predictions: Predictions, classes: Sequence[str]) -> dict[str, Any]:
        """Return the metrics and their intervals."""
        values, truth = _values(predictions)
        errors = values - truth
        metrics: dict[str, Any] = {
            "r2": predictions.score,
            "spearman": _spearman(values, truth),
            "mae": float(np.abs(errors).mean()),
            "rmse": float(np.sqrt((errors**2).mean())),
            "num_samples": len(truth),
        }
        number = len(truth)
        intervals = resample(
            number,
            {
                "r2": lambda weights: _weigh_r2(values, truth, weights),
                "spearman": lambda weights: _weigh_spearman(values, truth, weights),
                "mae": lambda weights: weights @ np.abs(errors) / number,
                "rmse": lambda weights: np.sqrt(weights @ errors**2 / number),
            },
        )
        return metrics | {"intervals": intervals}

    def write_tables(
        self,
        folder: RunFolder,
        images: Sequence[EvaluatedImage],
        predictions: Predictions,
        classes: Sequence[str],
    ) -> None:
        """Write ``predictions.csv``."""
        assert isinstance(predictions.target, Number)
        margin = predictions.target.margin
        values, _ = _values(predictions)
        ends = () if margin is None else ("low", "high")
        rows = (
            (image, (value, *(() if margin is None else (value - margin, value + margin))))
            for image, value in zip(images, values.tolist(), strict=True)
        )
        write_predictions(folder, ("path", "label", "predicted", *ends), rows)

    def weigh_score(self, values: Floats, labels: Tensor) -> Callable[[Weights], Floats]:
        """Return R squared as a function of weights."""
        truth = labels[:, 0].double().numpy()
        return lambda weights: _weigh_r2(values[:, 0], truth, weights)

    def find_issues(self, predictions: Predictions, classes: Sequence[str]) -> list[LabelIssue]:
        """Return the numbers whose errors are outliers, the largest first.

        An error is an outlier beyond :data:`FAR` deviations from the median error. The deviation is that of
        normally distributed errors with the same median absolute deviation, which outliers do not enlarge.
        """
        values, truth = _values(predictions)
        errors = values - truth
        away = np.abs(errors - np.median(errors))
        deviation = float(np.median(away)) / _NORMAL_MAD
        far = away / deviation if deviation else np.zeros_like(away)
        order = [place for place in np.argsort(-far, kind="stable").tolist() if far[place] > FAR]
        return [
            LabelIssue(
                place,
                f"{values[place]:.9g}",
                (float(errors[place]), float(far[place])),
                ("", f": {far[place]:.1f} deviations"),
            )
            for place in order
        ]

    def describe(self, metrics: Mapping[str, Any]) -> str:
        """Return R squared with its interval, rank correlation and mean absolute error."""
        interval = metrics["intervals"].get("r2")
        limits = f" (95 % interval {interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
        rank = "" if metrics["spearman"] is None else f", rank correlation {metrics['spearman']:.4f}"
        return f"R squared {metrics['r2']:.4f}{limits}{rank}, mean absolute error {metrics['mae']:.4g}"


def choose_margin(errors: Tensor) -> float | None:
    """Return the margin that holds :data:`COVERAGE` of new errors; None from too few images to say.

    Args:
        errors: absolute errors (N,) of images that the network was not trained on.
    """
    place = math.ceil((len(errors) + 1) * COVERAGE)  # of N + 1 equally likely places of the next error
    return errors.sort().values[place - 1].item() if place <= len(errors) else None


def cover_cross_fitted(errors: Tensor) -> float | None:
    """Return the share of errors within a margin that other folds chose; None from too few images."""
    order = torch.randperm(len(errors), generator=torch.Generator().manual_seed(0))
    held = []
    for fold in range(NUM_FOLDS):
        inside = order[fold::NUM_FOLDS]
        others = torch.ones(len(errors), dtype=torch.bool)
        others[inside] = False
        margin = choose_margin(errors[others])
        if margin is None:
            return None
        held.append(errors[inside] <= margin)
    return torch.cat(held).double().mean().item()


def _errors(predictions: Predictions) -> Tensor:
    """Return the absolute errors, (N,) float64, in the numbers' own unit."""
    values, truth = _values(predictions)
    return torch.from_numpy(np.abs(values - truth))


def _values(predictions: Predictions) -> tuple[Floats, Floats]:
    """Return predicted and true numbers, (N,) each, in their own unit."""
    activate = predictions.target.activate
    outputs, labels = predictions.logits.double(), predictions.labels.double()
    return activate(outputs)[:, 0].numpy(), activate(labels)[:, 0].numpy()


def _weigh_r2(values: Floats, truth: Floats, weights: Weights) -> Floats:
    number = weights.sum(axis=1)
    spread: Floats = weights @ truth**2 - (weights @ truth) ** 2 / number
    errors: Floats = weights @ (values - truth) ** 2
    return 1 - _divide(errors, spread)


def _spearman(values: Floats, truth: Floats) -> float | None:
    """Return the correlation of ranks; None where all numbers are equal."""
    found = _weigh_spearman(values, truth, np.ones((1, len(truth))))[0]
    return None if np.isnan(found) else float(found)


def _weigh_spearman(values: Floats, truth: Floats, weights: Weights) -> Floats:
    """Return the correlation of ranks of each row of weights, (R,); equal numbers share their mean rank."""
    one, other = _rank(values, weights), _rank(truth, weights)
    number = weights.sum(axis=1, keepdims=True)

    def centre(ranks: Floats) -> Floats:
        centred: Floats = ranks - (weights * ranks).sum(axis=1, keepdims=True) / number
        return centred

    one, other = centre(one), centre(other)
    product = (weights * one * other).sum(axis=1)
    spread = (weights * one**2).sum(axis=1) * (weights * other**2).sum(axis=1)
    return _divide(product, np.sqrt(spread))


def _divide(values: Floats, by: Floats) -> Floats:
    """Return quotients (R,); NaN where the divisor is not positive."""
    quotients: Floats = np.divide(values, by, out=np.full(len(values), np.nan), where=by > 0)
    return quotients


def _rank(values: Floats, weights: Weights) -> Floats:
    """Return the mean rank of each number among those drawn, (R, N)."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(values[order]) != 0))
    sums = np.add.reduceat(weights[:, order], starts, axis=1)
    places = np.searchsorted(values[order][starts], values)
    ranks: Floats = (sums.cumsum(axis=1) - sums / 2)[:, places]
    return ranks
