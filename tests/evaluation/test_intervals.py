"""Intervals have their nominal coverage, and a width even without mistakes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from finetune.evaluation.intervals import (
    _resample_roc_auc,
    _resample_shares,
    compute_intervals,
    compute_wilson,
)
from finetune.evaluation.metrics import compute_confusion, compute_macro, compute_roc_auc
from finetune.evaluation.predictions import Predictions


def draw(rng: np.random.Generator, num_images: int, accuracy: float, num_classes: int = 3) -> Predictions:
    """Return predictions that are right with a given probability."""
    labels = torch.from_numpy(rng.integers(num_classes, size=num_images))
    wrong = (labels + torch.from_numpy(rng.integers(1, num_classes, size=num_images))) % num_classes
    said = torch.where(torch.from_numpy(rng.random(num_images) < accuracy), labels, wrong)
    return Predictions(2 * torch.nn.functional.one_hot(said, num_classes).float(), labels)


@pytest.mark.slow
def test_an_interval_covers_the_true_value_in_95_percent() -> None:
    rng, turns = np.random.default_rng(5), 120
    held = {"accuracy": 0, "balanced_accuracy": 0}
    for turn in range(turns):
        intervals = compute_intervals(draw(rng, 100, 0.85), seed=turn)
        for name in held:
            low, high = intervals[name]
            held[name] += low <= 0.85 <= high
    for name, count in held.items():  # under a true 95 %, below 86 % or 100 % has p < 0.001
        assert 0.86 * turns <= count < turns, name


def test_the_interval_of_accuracy_is_binomial() -> None:
    predictions = draw(np.random.default_rng(0), 400, 0.9)
    hits = int((predictions.predicted == predictions.labels).sum())
    exact = binomtest(hits, 400).proportion_ci(method="wilson")
    assert compute_intervals(predictions)["accuracy"] == pytest.approx((exact.low, exact.high), abs=0.008)


def test_without_mistakes_the_interval_has_a_width() -> None:
    labels = torch.tensor([0] * 20 + [1] * 10)
    right = Predictions(5 * torch.nn.functional.one_hot(labels, 2).float(), labels)
    intervals = compute_intervals(right)
    wilson = binomtest(30, 30).proportion_ci(method="wilson")
    assert intervals["accuracy"] == pytest.approx((wilson.low, 1.0))
    assert intervals["balanced_accuracy"][0] == pytest.approx(0.84, abs=0.02)
    assert intervals["f1_macro"] == intervals["balanced_accuracy"]
    assert "roc_auc" not in intervals  # equal in every resample, so its spread is unknown
    wrong = Predictions(5 * torch.nn.functional.one_hot(1 - labels, 2).float(), labels)
    assert compute_intervals(wrong)["accuracy"] == pytest.approx((0.0, 1 - wilson.low))


def test_a_rare_class_gives_a_wide_interval_with_or_without_mistakes() -> None:
    labels = torch.tensor([0] * 100 + [1])
    said = labels.clone()
    widths = []
    for mistakes in (0, 1, 2):
        said[:mistakes] = 1
        one = Predictions(5 * torch.nn.functional.one_hot(said, 2).float(), labels)
        low, high = compute_intervals(one)["balanced_accuracy"]
        widths.append(high - low)
    assert max(widths) < 1.05 * min(widths)
    assert min(widths) > 0.3


def test_a_network_that_predicts_a_single_class() -> None:
    labels = torch.tensor([0] * 100 + [1] * 100)
    one = Predictions(torch.tensor([[5.0, 0.0]]).repeat(200, 1), labels)
    low, high = compute_intervals(one)["balanced_accuracy"]
    assert low < 0.49 < 0.51 < high


@pytest.mark.parametrize(("hits", "number"), [(0, 7), (3, 7), (7, 7), (90, 100)])
def test_wilson_intervals_equal_those_of_scipy(hits: int, number: int) -> None:
    theirs = binomtest(hits, number).proportion_ci(method="wilson")
    assert compute_wilson(hits, number) == pytest.approx((theirs.low, theirs.high), abs=1e-6)
    one_sided = binomtest(hits, number, alternative="greater").proportion_ci(method="wilson")
    assert compute_wilson(hits, number, 1.644854)[0] == pytest.approx(one_sided.low, abs=1e-6)


def test_every_headline_metric_has_a_reproducible_interval() -> None:
    predictions = draw(np.random.default_rng(1), 60, 0.7, num_classes=7)
    intervals = compute_intervals(predictions)
    assert set(intervals) == {
        "accuracy", "balanced_accuracy", "f1_macro", "loss", "top5_accuracy", "roc_auc",
    }  # fmt: skip
    assert all(low < high for low, high in intervals.values())
    assert compute_intervals(predictions) == intervals
    assert compute_intervals(predictions, seed=1) != intervals


class _Fixed:
    """A generator that draws every image, or cell, exactly as often as it occurs."""

    def __init__(self, counts: np.ndarray) -> None:
        self.counts = counts

    def multinomial(self, *_: object, size: int) -> np.ndarray:
        return np.tile(self.counts, (size, 1))


@pytest.mark.parametrize("coarse", [False, True], ids=["no ties", "ties"])
def test_a_resample_of_every_image_once_gives_the_metric(coarse: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(80, 5, generator=generator)
    logits[:, 3] = -100  # a class that is never predicted, and one without images
    labels = torch.randint(4, (80,), generator=generator)
    predictions = Predictions(logits.round() if coarse else logits, labels)
    confusion = compute_confusion(predictions)
    cells = _resample_shares(confusion, _Fixed(confusion[confusion > 0]))  # type: ignore[arg-type]
    shares = {"accuracy": predictions.accuracy} | compute_macro(predictions)
    assert {name: values[7] for name, values in cells.items()} == pytest.approx(
        {name: shares[name] for name in cells}
    )
    areas = _resample_roc_auc(predictions, _Fixed(np.ones(80, int)))  # type: ignore[arg-type]
    assert areas[7] == pytest.approx(compute_roc_auc(predictions))


def test_one_image_of_one_class() -> None:
    intervals = compute_intervals(Predictions(torch.tensor([[3.0, 0.0]]), torch.tensor([0])))
    assert intervals["accuracy"] == pytest.approx((0.2065, 1.0), abs=1e-3)
    assert "roc_auc" not in intervals
    assert "loss" not in intervals


def test_resamples_of_a_single_class_have_no_roc_auc() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    intervals = compute_intervals(Predictions(torch.randn(4, 2), labels))
    assert all(np.isfinite(intervals[name]).all() for name in intervals)
