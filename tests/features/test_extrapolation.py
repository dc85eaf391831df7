"""Fitted curves: they find planted power laws, know what they do not know, and answer what a target needs."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from finetune.errors import UsageError
from finetune.features.forecast.extrapolation import CurveSample, find_interval, fit_curves
from finetune.features.forecast.learning_curve import Floats, LearningCurve
from finetune.features.forecast.requirement import Requirement, check_target, find_requirement

SHARES = np.array([0.12, 0.17, 0.25, 0.36, 0.52, 0.75, 1.0])
N = 400


def plant(
    scale: float, exponent: float, floor: float, noise: float, seed: int | None = None
) -> LearningCurve:
    """A power law with a floor; half of the noise is common to all points. Without a seed nothing is off."""
    covariance = noise**2 * (0.5 * np.ones((7, 7)) + 0.5 * np.eye(7))
    errors = fall(scale, exponent, floor, SHARES)
    if seed is not None:
        errors = np.random.default_rng(seed).multivariate_normal(errors, covariance)
    return LearningCurve(N * SHARES, 1 - errors, covariance, N)


def fall(scale: float, exponent: float, floor: float, shares: Floats | float) -> Floats:
    error: Floats = floor + scale * np.asarray(shares) ** -exponent
    return error


def certain(accuracy: float, floor: float = 0.0, exponent: float = 0.5, spread: float = 0.0) -> CurveSample:
    """Curves with one floor and exponent, whose error on N images varies."""
    errors = (1 - accuracy) * np.exp(spread * np.linspace(-1.7, 1.7, 201))
    same = np.ones(201)
    return CurveSample(N, errors, floor * same, exponent * same, 0 * same, 0 * same)


# --- the fit -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("exponent", "floor"), [(0.3, 0.0), (0.6, 0.05), (1.0, 0.1), (0.5, 0.15)])
def test_a_planted_curve_is_found(exponent: float, floor: float) -> None:
    curves = fit_curves(plant(0.2, exponent, floor, 0.003), seed=0)
    for times in (1, 2, 4):
        middle, low, high = find_interval(curves.accuracies(times * N))
        truth = 1 - float(fall(0.2, exponent, floor, times))
        assert low <= truth <= high and abs(middle - truth) < 0.015, (times, middle, truth)


def test_the_interval_covers_planted_curves_as_often_as_it_says() -> None:
    """Curves drawn from what is usual, 60 of them: as often as stated, and not for being endless."""
    rng = np.random.default_rng(1)
    held, widths = {2: 0, 4: 0}, []
    for seed in range(60):
        exponent, floor = 0.6 * np.exp(0.7 * rng.standard_normal()), 0.3 * rng.uniform()
        scale = rng.uniform(0.05, 0.35)
        curves = fit_curves(plant(scale, exponent, floor, 0.015, seed), seed)
        for times in held:
            _, low, high = find_interval(curves.accuracies(times * N))
            held[times] += low <= 1 - fall(scale, exponent, floor, times) <= high
            widths.append(high - low)
    assert min(held.values()) >= 51  # of 60; 54 are expected, less 1.3 deviations
    assert np.mean(widths) < 0.12


def test_least_squares_of_one_shape_is_scipys() -> None:
    """The closed form of E and its deviation, against generalised least squares by whitening."""
    from finetune.features.forecast.extrapolation import _fit_errors

    curve = plant(0.2, 0.5, 0.05, 0.02)
    shape = 0.3 + 0.7 * SHARES**-0.5
    white = np.linalg.inv(np.linalg.cholesky(curve.covariance))
    solution, *_ = np.linalg.lstsq((white @ shape)[:, None], white @ (1 - curve.accuracies), rcond=None)
    evidence, means, deviations = _fit_errors(
        np.array([shape, 1.1 * shape]), 1 - curve.accuracies, curve.covariance
    )
    assert means[0] == pytest.approx(solution[0]) and means[1] == pytest.approx(solution[0] / 1.1)
    assert deviations[0] == pytest.approx(1 / np.linalg.norm(white @ shape))
    assert evidence[0] - evidence[1] == pytest.approx(np.log(1.1))  # of the deviation alone


def test_it_is_less_certain_further_out_and_with_more_noise() -> None:
    def width(noise: float, times: int) -> float:
        _, low, high = find_interval(fit_curves(plant(0.2, 0.5, 0.05, noise), 0).accuracies(times * N))
        return high - low

    assert width(0.01, 1) < width(0.01, 2) < width(0.01, 4)
    assert width(0.003, 4) < width(0.01, 4) < width(0.03, 4)


def test_accuracies_stay_shares_and_do_not_fall() -> None:
    curves = fit_curves(plant(0.02, 0.5, 0.0, 0.03), seed=0)
    medians = [find_interval(curves.accuracies(size))[0] for size in np.geomspace(50, 4 * N, 20)]
    assert all(one <= other + 1e-9 for one, other in pairwise(medians))
    assert curves.accuracies(4 * N).max() <= 1 and curves.accuracies(50).min() >= 0
    assert (curves.limits() >= curves.accuracies(N) - 1e-9).all()


def test_a_seed_repeats_the_draw() -> None:
    curve = plant(0.2, 0.5, 0.05, 0.02)
    one, same, other = (fit_curves(curve, seed).accuracies(2 * N) for seed in (3, 3, 4))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


# --- what a target needs -------------------------------------------------------------------------


def test_the_images_of_a_target_are_where_the_curve_reaches_it() -> None:
    """20 % error at N falls as n^-0.5: 12 % at (20 / 12)^2 N."""
    found = find_requirement(certain(0.8, spread=0.03), 0.88)
    assert found.answer == "images"
    assert found.images == pytest.approx((20 / 12) ** 2 * N, rel=0.02)
    assert found.low is not None and found.high is not None
    assert found.low == pytest.approx((20 / 12) ** 2 * N * np.exp(-2 * 0.03 * 1.53), rel=0.02)
    assert found.low < found.images < found.high
    assert "about 1,100 images" in found.describe() and "90 %" in found.describe()


def test_a_target_that_is_met_is_reached() -> None:
    assert find_requirement(certain(0.9, spread=0.05), 0.85).answer == "reached"
    assert find_requirement(certain(0.9, spread=0.2), 0.895).answer == "images"  # not surely met


def test_a_target_above_the_end_of_the_curve_cannot_be_said() -> None:
    found = find_requirement(certain(0.8, floor=0.5, spread=0.05), 0.95)  # it ends near 90 %
    assert (found.answer, found.images, found.low, found.high) == ("cannot say", None, None, None)
    assert "No number of images reaches it" in found.reason and "90." in found.reason


def test_a_target_beyond_four_times_the_images_cannot_be_said() -> None:
    found = find_requirement(certain(0.8, spread=0.05), 0.95)  # 16 N
    assert found.answer == "cannot say" and found.low == 4 * N
    assert found.reason == "More than 1,600 images, where forecasts end."
    unsure = find_requirement(certain(0.8, spread=0.2), 0.905)  # 4.4 N, at least 2.4 N, rounded
    assert unsure.answer == "cannot say" and unsure.low == pytest.approx(2.4 * N, rel=0.05)
    assert "At least 970 images, probably more than 1,600" in unsure.reason


def test_an_end_beyond_four_times_the_images_is_open() -> None:
    found = find_requirement(certain(0.8, spread=0.1), 0.89)  # 3.3 N; the upper end is 4.5 N
    assert found.answer == "images" and found.high is None
    assert "more than 4 times those at hand" in found.describe()


def test_too_wide_a_forecast_says_nothing() -> None:
    found = find_requirement(certain(0.4, exponent=0.2, spread=0.5), 0.55)
    assert found.answer == "cannot say" and "too uncertain" in found.reason
    assert "cannot say. The forecast" in found.describe()


@pytest.mark.parametrize(("target", "said"), [(95, "such as 0.95"), (0, "0.95"), (1, "0.95"), (-3, "0.95")])
def test_a_target_is_a_share(target: float, said: str) -> None:
    with pytest.raises(UsageError, match="between 0 and 1") as refusal:
        check_target(target)
    assert said in refusal.value.fix
    check_target(0.95)


def test_an_answer_is_plain_json() -> None:
    found = Requirement(0.9, "images", 500, 400, None)
    assert found.to_dict() == {
        "target": 0.9,
        "answer": "images",
        "images": 500,
        "low": 400,
        "high": None,
        "reason": "",
        "said": found.describe(),
    }
