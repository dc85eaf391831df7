"""Paired comparison, held against scikit-learn's companions (scipy) and against plain resampling."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, false_discovery_control

from finetune.evaluation.compare import (
    Comparison,
    Rights,
    compare_pairs,
    compute_mcnemar,
    correct_holm,
    resample_difference,
)


def answers(both: int, only_first: int, only_second: int, neither: int) -> tuple[Rights, Rights]:
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return np.array(first), np.array(second)


def compare(both: int, only_first: int, only_second: int, neither: int) -> Comparison:
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
    assert compute_mcnemar(0, 3_000) == 0  # 2 ** -2999, which is no float any more
    assert compute_mcnemar(25_000, 25_000) == 1


def test_the_example_of_agresti() -> None:
    """Approval of a prime minister at two surveys (Categorical Data Analysis, table 10.1)."""
    assert compute_mcnemar(150, 86) == pytest.approx(3.7e-5, rel=0.05)


def test_the_p_value_is_not_the_mid_p_value() -> None:
    """Five of five: 2 / 2 ** 5."""
    assert compute_mcnemar(0, 5) == pytest.approx(0.0625)
    assert compute_mcnemar(5, 0) == pytest.approx(0.0625)


# --- the interval --------------------------------------------------------------------------------


def test_the_interval_is_that_of_drawing_images() -> None:
    first, second = answers(100, 12, 25, 16)
    generator = np.random.default_rng(1)
    places = generator.integers(len(first), size=(20_000, len(first)))
    drawn = second[places].mean(axis=1) - first[places].mean(axis=1)
    expected = np.quantile(drawn, (0.025, 0.975))
    found = resample_difference(12, 25, len(first), 50_000)
    assert np.abs(np.array(found) - expected).max() < 0.004


def test_the_interval_is_paired() -> None:
    """Two that nearly always agree differ by less than their own intervals would allow."""
    low, high = resample_difference(2, 12, 1000)
    assert 0 < low < 0.01 < high < 0.02


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator, shares, hits = np.random.default_rng(0), [0.08, 0.15, 0.77], 0
    for number in range(300):
        only_first, only_second, _ = generator.multinomial(300, shares)
        low, high = resample_difference(int(only_first), int(only_second), 300, 2_000, number)
        hits += low <= 0.07 <= high
    assert 0.91 <= hits / 300 <= 0.985


def test_the_same_seed_gives_the_same_interval() -> None:
    assert resample_difference(3, 9, 80) == resample_difference(3, 9, 80)
    assert resample_difference(3, 9, 80, seed=1) != resample_difference(3, 9, 80)


def test_nothing_differs() -> None:
    assert resample_difference(0, 0, 50) == (0.0, 0.0)


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
    assert "their accuracies are equal" in compare(120, 8, 8, 13).sentence


def test_a_small_p_value_is_not_enough() -> None:
    """The interval must leave 0 out as well, and 0 lies in one that ends there."""
    pair = Comparison("a", "b", 100, 1, 9, 0.8, 0.88, (0.0, 0.15), 0.021, 0.021)
    assert not pair.is_claimed
    assert Comparison("a", "b", 100, 1, 9, 0.8, 0.88, (0.01, 0.15), 0.021, 0.021).is_claimed
    assert not Comparison("a", "b", 100, 1, 9, 0.8, 0.88, (0.01, 0.15), 0.021, 0.05).is_claimed


def test_a_tiny_p_value_has_no_digits() -> None:
    assert "McNemar p < 0.0001)" in compare(500, 0, 100, 0).sentence


def test_equal_classifiers_are_seldom_told_apart() -> None:
    """The exact test claims too little rather than too much."""
    generator, claims = np.random.default_rng(3), 0
    for _ in range(200):
        _, only_first, only_second = generator.multinomial(200, [0.8, 0.1, 0.1])
        claims += compare(160 - 20, int(only_first), int(only_second), 20).is_claimed
    assert claims / 200 <= 0.05
