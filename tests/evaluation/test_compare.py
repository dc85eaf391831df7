"""Paired comparison against scipy, published examples and plain resampling."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, false_discovery_control, multinomial, norm

from finetune.evaluation.paired_tests import (
    PairedTest,
    Rights,
    compare_pairs,
    compute_interval,
    compute_mcnemar,
    correct_holm,
)


def answers(both: int, only_first: int, only_second: int, neither: int) -> tuple[Rights, Rights]:
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return np.array(first), np.array(second)


def compare(both: int, only_first: int, only_second: int, neither: int) -> PairedTest:
    first, second = answers(both, only_first, only_second, neither)
    (pair,) = compare_pairs([("a", first, "b", second)])
    return pair


# --- McNemar -------------------------------------------------------------------------------------


@pytest.mark.parametrize("only_first", [0, 1, 2, 3, 5, 8, 20, 101])
@pytest.mark.parametrize("only_second", [0, 1, 2, 4, 9, 30, 100])
def test_the_p_value_is_that_of_the_binomial_test(only_first: int, only_second: int) -> None:
    total = only_first + only_second
    expected = binomtest(only_first, total).pvalue if total else 1.0
    assert compute_mcnemar(only_first, only_second) == pytest.approx(expected, rel=1e-9)


def test_the_p_value_of_many_images() -> None:
    assert compute_mcnemar(24_700, 25_300) == pytest.approx(binomtest(24_700, 50_000).pvalue, rel=1e-6)
    assert compute_mcnemar(0, 3_000) == 0  # 2 ** -2999 underflows
    assert compute_mcnemar(25_000, 25_000) == 1


def test_the_example_of_agresti() -> None:
    """Approval of a prime minister at two surveys (Categorical Data Analysis, table 10.1)."""
    assert compute_mcnemar(150, 86) == pytest.approx(3.7e-5, rel=0.05)


def test_the_p_value_is_not_the_mid_p_value() -> None:
    """Five of five: 2 / 2 ** 5."""
    assert compute_mcnemar(0, 5) == pytest.approx(0.0625)
    assert compute_mcnemar(5, 0) == pytest.approx(0.0625)


# --- the interval --------------------------------------------------------------------------------


def test_the_interval_of_a_published_example() -> None:
    """Airways of children before and after a transplant (Fagerland, Lydersen and Laake 2014, table 1)."""
    assert compute_interval(7, 1, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)


@pytest.mark.parametrize(
    ("num_images", "only_first", "only_second"),
    [(1, 0, 0), (5, 0, 2), (5, 3, 2), (21, 1, 7), (153, 0, 0), (153, 0, 1), (153, 50, 90), (2000, 3, 1)],
)
def test_the_interval_is_where_a_quartic_is_zero(num_images: int, only_first: int, only_second: int) -> None:
    """The same limits by another way: Yang, Sun and Hardin (Statistics in Medicine 32, 2013)."""
    n, b, c, g = num_images, only_second, only_first, norm.ppf(0.975) ** 2
    quartic = (
        n**2 * (n / g + 1) ** 2,
        -n * (b - c) * (n / g + 1) * (4 * n / g + 1),
        2 * n * (b - c) ** 2 * (3 * n / g + 2) / g - n**2 * ((b + c) / g + 1),
        n * (b - c) * (2 * (b + c) / g + 1) - (b - c) ** 3 * (4 * n / g + 1) / g,
        (b - c) ** 2 * ((b - c) ** 2 / g - (b + c)) / g,
    )
    roots = np.roots(quartic)
    real = roots[np.abs(roots.imag) < 1e-6].real
    assert compute_interval(only_first, only_second, num_images) == pytest.approx((real.min(), real.max()))


def test_the_interval_of_many_images_is_that_of_drawing_images() -> None:
    generator = np.random.default_rng(1)
    drawn = generator.multinomial(1530, np.array([120, 250, 1160]) / 1530, size=20_000)
    expected = np.quantile((drawn[:, 1] - drawn[:, 0]) / 1530, (0.025, 0.975))
    assert np.abs(np.array(compute_interval(120, 250, 1530)) - expected).max() < 0.002


def test_the_interval_is_paired() -> None:
    """The interval of the difference is narrower than the two separate intervals suggest."""
    low, high = compute_interval(2, 12, 1000)
    assert 0 < low < 0.01 < high < 0.02


@pytest.mark.parametrize(
    ("num_images", "only_first", "only_second"),
    [(30, 0.01, 0.01), (50, 0.02, 0.05), (40, 0.0, 0.04), (30, 0.1, 0.2)],
)
def test_the_interval_has_its_nominal_coverage(
    num_images: int, only_first: float, only_second: float
) -> None:
    """Computed over all outcomes, also for classifiers that differ on few images."""
    shares, chance = [only_first, only_second, 1 - only_first - only_second], 0.0
    for one in range(num_images + 1):
        for other in range(num_images + 1 - one):
            weight = multinomial.pmf([one, other, num_images - one - other], num_images, shares)
            if weight > 1e-6:
                low, high = compute_interval(one, other, num_images)
                chance += weight * (low <= only_second - only_first <= high)
    assert chance >= 0.94


def test_without_differences_the_interval_has_a_width() -> None:
    square = norm.ppf(0.975) ** 2
    for num_images in (1, 50, 153):
        end = square / (num_images + square)
        assert compute_interval(0, 0, num_images) == pytest.approx((-end, end))
    assert "95 % interval -2.4 to 2.4" in compare(150, 0, 0, 3).sentence


def test_if_all_images_differ_the_interval_ends_at_one() -> None:
    low, high = compute_interval(0, 20, 20)
    assert 0.5 < low < 1 and high == 1
    assert compute_interval(20, 0, 20) == pytest.approx((-1, -low))


# --- several pairs -------------------------------------------------------------------------------


def test_holm_by_hand() -> None:
    assert correct_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert correct_holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert correct_holm([0.03]) == [0.03]
    assert correct_holm([]) == []


def test_holm_lies_between_bonferroni_and_benjamini_and_hochberg() -> None:
    p_values = np.random.default_rng(0).uniform(0, 0.2, 12)
    holm = np.array(correct_holm(p_values.tolist()))
    assert (holm <= np.minimum(1, 12 * p_values) + 1e-12).all()
    assert (holm >= false_discovery_control(p_values) - 1e-12).all()
    assert (np.diff(holm[np.argsort(p_values)]) >= 0).all()


def test_the_correction_counts_all_pairs() -> None:
    one, two = answers(100, 2, 11, 20)
    (alone,) = compare_pairs([("a", one, "b", two)])
    three = compare_pairs([("a", one, "b", two), ("a", one, "c", one), ("b", two, "c", one)])
    assert alone.p_value == alone.p_corrected == pytest.approx(binomtest(2, 13).pvalue)
    assert three[0].p_value == alone.p_value
    assert three[0].p_corrected == pytest.approx(3 * alone.p_value)
    assert alone.is_claimed and not three[0].is_claimed
    assert three[1].p_corrected == 1


# --- the words -----------------------------------------------------------------------------------


def test_a_difference_that_may_be_claimed() -> None:
    pair = compare(120, 3, 20, 10)
    assert (pair.num_images, pair.difference) == (153, pytest.approx(17 / 153))
    assert (pair.first_accuracy, pair.second_accuracy) == (pytest.approx(123 / 153), pytest.approx(140 / 153))
    low, high = (100 * end for end in pair.interval)
    said = f"b is better than a by 11.1 points (95 % interval {low:.1f} to {high:.1f}; McNemar p = 0.00049)"
    assert pair.sentence == said


def test_the_better_one_comes_first_whatever_the_order() -> None:
    pair = compare(120, 20, 3, 10)
    assert pair.difference < 0
    low, high = (100 * end for end in pair.interval)
    assert pair.sentence.startswith("a is better than b by 11.1 points (95 % interval ")
    assert f"{-high:.1f} to {-low:.1f}" in pair.sentence


def test_no_difference_that_may_be_claimed() -> None:
    pair = compare(120, 8, 12, 13)
    low, high = (100 * end for end in pair.interval)
    assert pair.sentence == (
        f"no difference can be claimed between a and b (b has 2.6 points more; 95 % interval {low:.1f} to "
        f"{high:.1f}; McNemar p = 0.5)"
    )
    assert "(they are equal;" in compare(120, 8, 8, 13).sentence


def test_a_small_p_value_is_not_enough() -> None:
    """The interval must exclude 0 too, and an interval that ends at 0 contains it."""
    pair = PairedTest("a", "b", 100, 1, 9, 0.8, 0.88, (0.0, 0.15), 0.021, 0.021)
    assert not pair.is_claimed
    assert PairedTest("a", "b", 100, 1, 9, 0.8, 0.88, (0.01, 0.15), 0.021, 0.021).is_claimed
    assert not PairedTest("a", "b", 100, 1, 9, 0.8, 0.88, (0.01, 0.15), 0.021, 0.05).is_claimed


def test_a_tiny_p_value_has_no_digits() -> None:
    assert "McNemar p < 0.0001)" in compare(500, 0, 100, 0).sentence


def test_equal_classifiers_seldom_give_a_claimed_difference() -> None:
    """The exact test is conservative."""
    generator, claims = np.random.default_rng(3), 0
    for _ in range(200):
        _, only_first, only_second = generator.multinomial(200, [0.8, 0.1, 0.1])
        claims += compare(160 - 20, int(only_first), int(only_second), 20).is_claimed
    assert claims / 200 <= 0.05
