"""Metrics and thresholds of several labels, against scikit-learn and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score

from finetune.evaluation.multi_label import (
    MultiLabelJudge,
    _weigh_precision,
    choose_thresholds,
    decide_cross_fitted,
)
from finetune.evaluation.predictions import Predictions
from finetune.targets import MultiLabel

CLASSES = ("a", "b", "c", "d")


def draw(number: int = 200, seed: int = 0, coarse: bool = False) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(number, 4, generator=generator) < torch.tensor([0.1, 0.3, 0.5, 0.7])).float()
    logits = 1.5 * (2 * labels - 1) + 1.5 * torch.randn(number, 4, generator=generator)
    return Predictions(logits.round() if coarse else logits, labels, MultiLabel())


def test_metrics_are_scikit_learns() -> None:
    predictions = draw()
    metrics = MultiLabelJudge().measure(predictions, CLASSES)
    truth, said = predictions.labels.numpy(), (predictions.probabilities >= 0.5).numpy()
    assert metrics["f1_micro"] == pytest.approx(f1_score(truth, said, average="micro"))
    assert metrics["f1_macro"] == pytest.approx(f1_score(truth, said, average="macro"))
    assert metrics["precision_macro"] == pytest.approx(precision_score(truth, said, average="macro"))
    assert metrics["recall_macro"] == pytest.approx(recall_score(truth, said, average="macro"))
    assert metrics["exact_match"] == pytest.approx((truth == said).all(axis=1).mean())
    scores = predictions.logits.numpy()
    assert metrics["map"] == pytest.approx(average_precision_score(truth, scores, average="macro"))
    for name, (low, high) in metrics["intervals"].items():
        assert low < metrics[name] < high
        assert high - low < 0.2


@pytest.mark.parametrize("coarse", [False, True])
def test_the_weighted_average_precision_is_scikit_learns(coarse: bool) -> None:
    predictions = draw(80, coarse=coarse)
    truth, scores = predictions.labels.numpy() > 0, predictions.logits.double().numpy()
    weights = np.random.default_rng(0).multinomial(80, np.full(80, 1 / 80), size=5).astype(float)
    found = _weigh_precision(scores, truth, weights)
    for own, value in zip(weights, found, strict=True):
        expected = average_precision_score(truth, scores, average="macro", sample_weight=own)
        assert value == pytest.approx(expected)


def test_an_interval_covers_new_draws() -> None:
    many = [MultiLabelJudge().measure(draw(100, seed), CLASSES) for seed in range(40)]
    truth = MultiLabel().compute_score(draw(20_000, 99).logits, draw(20_000, 99).labels)
    held = [low <= truth <= high for low, high in (one["intervals"]["map"] for one in many)]
    assert 0.8 <= np.mean(held) <= 1


def test_a_threshold_has_the_highest_f1_of_all() -> None:
    predictions = draw(60, coarse=True)
    probabilities, truth = predictions.probabilities, predictions.labels.numpy()
    thresholds = choose_thresholds(probabilities, predictions.labels)
    for k, threshold in enumerate(thresholds):
        own = probabilities[:, k].numpy()
        best = max(f1_score(truth[:, k], own >= limit) for limit in np.unique(own))
        assert f1_score(truth[:, k], own >= threshold) == pytest.approx(best)
        assert threshold not in own


def test_a_class_without_images_has_no_metrics_and_the_usual_threshold() -> None:
    predictions = draw()
    predictions.labels[:, 1] = 0
    assert choose_thresholds(predictions.probabilities, predictions.labels)[1] == 0.5
    metrics = MultiLabelJudge().measure(predictions, CLASSES)
    assert metrics["classes_not_judged"] == ["b"]
    kept = [0, 2, 3]
    truth, said = predictions.labels.numpy()[:, kept], (predictions.probabilities >= 0.5).numpy()[:, kept]
    assert metrics["f1_macro"] == pytest.approx(f1_score(truth, said, average="macro"))


def test_thresholds_of_noise_help_nobody() -> None:
    """Chosen and judged on the same images, thresholds look better than they are."""
    generator = torch.Generator().manual_seed(1)
    labels = (torch.rand(60, 20, generator=generator) < 0.2).float()
    noise = torch.rand(60, 20, generator=generator)
    own = MultiLabel(choose_thresholds(noise, labels)).decide(noise).numpy()
    fair = decide_cross_fitted(noise, labels).numpy()
    truth = labels.numpy()
    optimistic = f1_score(truth, own, average="macro")
    assert f1_score(truth, fair, average="macro", zero_division=0.0) < optimistic - 0.05


def test_a_summary_is_cross_fitted_where_validation_images_judge() -> None:
    predictions = draw(60)
    own = MultiLabelJudge().summarize(predictions, None, CLASSES)
    assert own.metrics["thresholds"]["same_images"]
    assert own.target == MultiLabel(choose_thresholds(predictions.probabilities, predictions.labels))
    said = decide_cross_fitted(predictions.probabilities, predictions.labels).numpy()
    expected = f1_score(predictions.labels.numpy(), said, average="micro")
    assert own.metrics["f1_micro"] == pytest.approx(expected)
    others = draw(60, seed=5)
    held = MultiLabelJudge().summarize(predictions, others, CLASSES)
    assert held.target == MultiLabel(choose_thresholds(others.probabilities, others.labels))
    said = held.target.decide(predictions.probabilities).numpy()
    assert held.metrics["f1_micro"] == pytest.approx(
        f1_score(predictions.labels.numpy(), said, average="micro")
    )
