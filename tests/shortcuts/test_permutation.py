"""Permutation tests: labels move with their groups, p values are uniform at most, Holm as published."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kstest

from finetune.shortcuts.permutation import ENOUGH, MOST, LabelPermuter, adjust_holm, permutation_test


def test_groups_keep_one_label_and_classes_their_sizes() -> None:
    groups = np.concatenate([np.arange(20), np.repeat(np.arange(20, 30), 3)])
    labels = np.concatenate([np.arange(20) % 3, np.repeat(np.arange(10) % 3, 3)])
    drawn = LabelPermuter(labels, groups).draw(50, np.random.default_rng(0))
    assert (drawn != labels).any(axis=1).all()
    for group in range(20, 30):
        assert (drawn[:, groups == group] == drawn[:, groups == group][:, :1]).all()
    for row in drawn:
        assert np.array_equal(np.bincount(row), np.bincount(labels))


def test_images_of_a_group_with_several_labels_exchange_them() -> None:
    groups, labels = np.repeat([0, 1], 6), np.tile([0, 1, 1], 4)
    drawn = LabelPermuter(labels, groups).draw(20, np.random.default_rng(0))
    assert (drawn[:, groups == 0].sum(axis=1) == 4).all() and (drawn != labels).any()


def test_the_number_of_arrangements() -> None:
    assert LabelPermuter(np.array([0, 0, 1, 1]), np.arange(4)).log_arrangements == pytest.approx(np.log(6))
    assert LabelPermuter(np.array([0, 0, 1, 1]), np.array([5, 5, 7, 7])).log_arrangements == pytest.approx(
        np.log(2)
    )


def test_p_values_of_noise_are_not_small_too_often() -> None:
    labels = np.arange(40) % 2
    permuter = LabelPermuter(labels, np.arange(40))
    values = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        facts = rng.normal(size=40)
        score = lambda some, facts=facts: np.abs((some * facts).mean(axis=1) - facts.mean() / 2)  # noqa: E731
        values.append(permutation_test(float(score(labels[None])[0]), score, permuter, rng, 50).p)
    assert kstest(values, "uniform", alternative="greater").pvalue > 0.01
    assert np.mean(np.array(values) < 0.05) < 0.09


def test_a_test_ends_early_unless_the_labels_matter() -> None:
    permuter, rng = LabelPermuter(np.arange(40) % 2, np.arange(40)), np.random.default_rng(0)
    never = permutation_test(1.0, lambda some: np.zeros(len(some)), permuter, rng, 100)
    assert (never.p, never.number) == (1 / (MOST + 1), MOST)
    always = permutation_test(0.0, lambda some: np.zeros(len(some)), permuter, rng, 100)
    assert always.p == 1.0 and always.number < 2 * ENOUGH + 1


def test_holms_correction() -> None:
    assert adjust_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjust_holm([]) == [] and adjust_holm([0.6, 0.9]) == [1.0, 1.0]
