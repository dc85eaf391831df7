"""Metrics and prediction intervals of numbers, against scikit-learn, scipy and the stated coverage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from finetune.evaluation.number import (
    COVERAGE,
    NumberJudge,
    _weigh_r2,
    _weigh_spearman,
    choose_margin,
    cover_cross_fitted,
)
from finetune.evaluation.predictions import Predictions
from finetune.targets import Number

TARGET = Number(mean=40.0, std=12.0)


def draw(number: int = 150, seed: int = 0, noise: float = 0.5) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randn(number, 1, generator=generator)
    return Predictions(labels + noise * torch.randn(number, 1, generator=generator), labels, TARGET)


def test_metrics_are_those_of_the_libraries_in_their_own_unit() -> None:
    predictions = draw()
    metrics = NumberJudge().measure(predictions, ("value",))
    truth = 40 + 12 * predictions.labels[:, 0].double().numpy()
    values = 40 + 12 * predictions.logits[:, 0].double().numpy()
    assert metrics["r2"] == pytest.approx(r2_score(truth, values))
    assert metrics["mae"] == pytest.approx(mean_absolute_error(truth, values))
    assert metrics["rmse"] == pytest.approx(root_mean_squared_error(truth, values))
    assert metrics["spearman"] == pytest.approx(spearmanr(truth, values).statistic)
    for name, (low, high) in metrics["intervals"].items():
        assert low < metrics[name] < high


@pytest.mark.parametrize("coarse", [False, True])
def test_weights_are_repeated_images(coarse: bool) -> None:
    predictions = draw(60)
    truth, values = (part[:, 0].double().numpy() for part in (predictions.labels, predictions.logits))
    truth, values = (truth.round(), values.round()) if coarse else (truth, values)
    weights = np.random.default_rng(0).multinomial(60, np.full(60, 1 / 60), size=5)
    ranks = _weigh_spearman(values, truth, weights.astype(float))
    squares = _weigh_r2(values, truth, weights.astype(float))
    for own, rank, square in zip(weights, ranks, squares, strict=True):
        chosen = np.repeat(np.arange(60), own)
        assert rank == pytest.approx(spearmanr(values[chosen], truth[chosen]).statistic)
        assert square == pytest.approx(r2_score(truth[chosen], values[chosen]))


def test_equal_numbers_have_no_rank_correlation() -> None:
    labels = torch.zeros(9, 1)
    metrics = NumberJudge().measure(Predictions(labels, labels, TARGET), ("value",))
    assert metrics["spearman"] is None
    assert metrics["mae"] == 0
    assert metrics["intervals"] == {}


def test_the_margin_holds_the_stated_share_of_new_numbers() -> None:
    """Within two points on 500 draws of 60 validation images, of normal and of heavy-tailed errors."""
    generator = torch.Generator().manual_seed(0)
    for power in (1, 3):
        covered = []
        for _ in range(500):
            errors = torch.randn(60, generator=generator).abs() ** power
            margin = choose_margin(errors)
            assert margin is not None
            covered.append((torch.randn(2_000, generator=generator).abs() ** power <= margin).float().mean())
        assert torch.stack(covered).mean().item() == pytest.approx(COVERAGE, abs=0.02)


def test_too_few_images_have_no_margin() -> None:
    assert choose_margin(torch.rand(8)) is None
    assert choose_margin(torch.rand(9)) is not None
    assert cover_cross_fitted(torch.rand(10)) is None
    assert cover_cross_fitted(torch.rand(100)) == pytest.approx(COVERAGE, abs=0.08)


def test_a_summary_measures_coverage_on_other_images() -> None:
    evaluated, val = draw(400), draw(200, seed=1)
    summary = NumberJudge().summarize(evaluated, val, ("value",))
    facts = summary.metrics["prediction_interval"]
    assert facts["margin"] == summary.target.margin == pytest.approx(12 * 0.5 * 1.645, rel=0.15)
    assert facts["covered"] == pytest.approx(COVERAGE, abs=0.05)
    assert not facts["same_images"]
    assert NumberJudge().summarize(val, None, ("value",)).metrics["prediction_interval"]["same_images"]
