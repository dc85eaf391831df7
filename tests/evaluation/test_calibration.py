"""Temperatures compared with a plain minimiser, and their effect on new images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from finetune.evaluation.calibration import (
    calibrate,
    calibrate_cross_fitted,
    find_threshold,
    find_thresholds,
    fit_temperature,
    measure_reliability,
)
from finetune.evaluation.predictions import Predictions
from finetune.evaluation.single_label import SingleLabelJudge


def draw(num_images: int, seed: int, sharpness: float = 1.0, num_classes: int = 4) -> Predictions:
    """Return predictions with labels drawn from their probabilities; then the logits are scaled."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(num_images, num_classes, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return Predictions(sharpness * logits, labels)


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 4.0])
def test_a_temperature_is_recovered(sharpness: float) -> None:
    assert fit_temperature(draw(4000, 0, sharpness)) == pytest.approx(sharpness, rel=0.08)


def test_the_temperature_minimises_the_loss() -> None:
    predictions = draw(500, 1, 3.0)
    best = minimize_scalar(
        lambda log: predictions.apply_temperature(float(np.exp(log))).loss, bounds=(-2, 3), method="bounded"
    )
    assert fit_temperature(predictions) == pytest.approx(float(np.exp(best.x)), rel=0.01)


def test_a_network_that_is_always_right_has_a_finite_temperature() -> None:
    labels = torch.arange(40) % 2
    right = Predictions(2 * torch.nn.functional.one_hot(labels, 2).float(), labels)
    softened = right.apply_temperature(fit_temperature(right))
    assert 0.95 < softened.probabilities.max() < 0.999  # at most one of 41 is wrong


def test_calibration_helps_on_images_that_did_not_fit_it() -> None:
    val, test = draw(600, 2, 4.0), draw(600, 3, 4.0)
    calibration = calibrate(test, val)
    facts = calibration.facts
    assert calibration.temperature == fit_temperature(val)
    assert facts["loss"] == test.loss
    assert (
        facts["loss_calibrated"] == test.apply_temperature(calibration.temperature).loss < 0.8 * facts["loss"]
    )
    assert facts["ece_calibrated"] < 0.5 * facts["ece"]
    assert facts["same_images"] is False


def test_images_that_fit_a_temperature_are_cross_fitted() -> None:
    val = draw(60, 4, 4.0)
    facts = calibrate(val, None).facts
    own = val.apply_temperature(fit_temperature(val)).loss
    assert facts["same_images"] is True
    assert own < facts["loss_calibrated"] == calibrate_cross_fitted(val).loss < facts["loss"]


def test_a_temperature_that_does_not_help_is_not_used() -> None:
    few = [calibrate(predictions, None) for predictions in (draw(20, seed) for seed in range(12))]
    left = [one for one in few if one.temperature == 1.0]
    assert left
    assert len(left) < len(few)
    for one in left:
        assert one.facts["loss_calibrated"] == one.facts["loss"]
        assert one.facts["bins_calibrated"] == one.facts["bins"]


def test_reliability_by_hand() -> None:
    sure = torch.tensor([[0.95, 0.05], [0.95, 0.05], [0.55, 0.45], [0.55, 0.45]]).log()
    reliability = measure_reliability(Predictions(sure, torch.tensor([0, 1, 0, 0])))
    assert reliability.ece == pytest.approx(0.5 * abs(0.95 - 0.5) + 0.5 * abs(0.55 - 1.0), abs=1e-6)
    full = [one for one in reliability.bins if one["count"]]
    assert [(one["count"], one["accuracy"]) for one in full] == [(2, 1.0), (2, 0.5)]
    assert all(one["low"] < one["confidence"] <= one["high"] for one in full)
    assert reliability.bins[0]["accuracy"] is None
    assert sum(one["count"] for one in reliability.bins) == 4


def test_thresholds_by_hand() -> None:
    confidence = np.array([0.99, 0.9, 0.9, 0.8, 0.7, 0.6])
    right = np.array([True, True, False, True, True, False])
    assert find_threshold(confidence, right, 0.99) == pytest.approx(0.945)
    assert find_threshold(confidence, right, 0.75) == pytest.approx(0.65)  # four of five
    assert find_threshold(confidence, right, 0.5) == 0  # all of them
    assert find_threshold(confidence, ~right, 0.9) is None
    equal = np.full(4, 0.9)  # no threshold separates ties
    assert find_threshold(equal, np.array([True, True, False, False]), 0.9) is None


def test_the_effect_of_a_threshold_is_measured_on_other_images() -> None:
    val, test = draw(800, 5), draw(800, 6)
    (found,) = find_thresholds(val, test, [0.9])
    confidence = test.probabilities.max(dim=1).values
    kept = confidence >= found["threshold"]
    assert found["coverage"] == pytest.approx(kept.double().mean().item())
    right = (test.predicted == test.labels)[kept].double().mean().item()
    assert found["achieved"] == pytest.approx(right, abs=1e-9)
    assert found["achieved"] == pytest.approx(0.9, abs=0.05)
    assert found["low"] < 0.9  # the lower limit is below the observed precision
    assert found["num_images"] == pytest.approx(800 * found["coverage"], rel=0.1)


def test_calibration_changes_no_predicted_class() -> None:
    raw = draw(200, 7, 4.0)
    summary = SingleLabelJudge().summarize(raw, None, "abcd")
    assert summary.predictions.predicted.equal(raw.predicted)
    assert summary.temperature > 2
    assert summary.metrics["loss"] == raw.loss
    assert summary.metrics["accuracy"] == raw.accuracy
    assert [one["precision"] for one in summary.metrics["reject"]] == [0.9, 0.95, 0.99]
