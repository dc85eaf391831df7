"""The learning curve: subsets keep classes and groups, points are honest, and their noise is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from finetune.features.forecast import learning_curve
from finetune.features.forecast.learning_curve import (
    LearningCurve,
    choose_shares,
    count_fits,
    draw_subset,
    find_others,
    measure_curve,
)
from finetune.features.rows import MemoryRows

CPU = torch.device("cpu")
CENTRES = torch.randn(3, 30, generator=torch.Generator().manual_seed(99))


def draw_images(number: int, seed: int) -> tuple[MemoryRows, Tensor]:
    """Independent images of three classes that overlap."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % 3
    return MemoryRows(CENTRES[labels] + 3.5 * torch.randn(number, 30, generator=generator)), labels


def measure(number: int, seed: int, groups: Tensor | None = None) -> LearningCurve:
    rows, labels = draw_images(number, seed)
    groups = torch.arange(number) if groups is None else groups
    return measure_curve(rows, labels, groups, 3, seed, CPU)


# --- subsets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.12, 0.4, 0.75])
def test_a_subset_has_its_share_of_each_class(share: float) -> None:
    labels = torch.tensor([0] * 80 + [1] * 24 + [2] * 9)
    train = draw_subset(labels, torch.arange(113), share, seed=1)
    for label, number in enumerate((80, 24, 9)):
        assert abs(int((labels[train] == label).sum()) - share * number) <= 0.5
    assert train.tolist() == sorted(set(train.tolist()))
    assert not train.equal(draw_subset(labels, torch.arange(113), share, seed=2))


@pytest.mark.parametrize("seed", range(20))
def test_groups_stay_whole_and_each_class_has_training_and_test_images(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(4).repeat_interleave(12)
    groups = 100 * labels + torch.randint(4, (48,), generator=generator)
    train = draw_subset(labels, groups, 0.5, seed)
    test = find_others(groups, train)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(48))
    assert not set(groups[train].tolist()) & set(groups[test].tolist())
    assert labels[train].unique().tolist() == labels[test].unique().tolist() == [0, 1, 2, 3]


def test_a_named_group_of_several_classes_is_drawn_once() -> None:
    labels = torch.arange(2).repeat_interleave(10)
    groups = torch.arange(20) % 5  # each group has two images of both classes
    train = draw_subset(labels, groups, 0.4, seed=0)
    assert len(groups[train].unique()) == 2 and len(train) == 8


def test_the_smallest_subset_has_three_images_of_the_smallest_class() -> None:
    assert choose_shares(8)[0] == pytest.approx(3 / 8)
    assert choose_shares(1000)[0] == pytest.approx(0.12)
    assert choose_shares(8)[-1] == pytest.approx(0.75)


# --- points --------------------------------------------------------------------------------------


def test_points_are_the_accuracies_on_new_images_of_the_same_kind() -> None:
    """Against many fresh images, within the stated deviations; the last point has all images."""
    from finetune.features.ridge import predict_others

    curve = measure(150, seed=3)
    assert curve.sizes[-1] == curve.num_images == 150 and len(curve.sizes) == 7
    truths = []
    for size in curve.sizes:
        hits = []
        for seed in range(12):
            rows, labels = draw_images(round(size) + 1200, 1000 + seed)
            train, test = torch.arange(round(size)), torch.arange(round(size), len(labels))
            predicted = predict_others(rows, train, labels[train], test, 3)
            hits.append((predicted == labels[test]).double().mean().item())
        truths.append(np.mean(hits))
    far = np.abs(curve.accuracies - truths) / np.sqrt(np.diag(curve.covariance))
    assert far.max() < 3, far
    assert curve.accuracies[-1] > curve.accuracies[0] + 0.05


@pytest.mark.slow
def test_the_covariance_is_that_of_other_draws() -> None:
    """Deviations over 20 other sets of images, as one set alone has estimated them."""
    curves = [measure(60, seed) for seed in range(20)]
    spread = np.std([curve.accuracies for curve in curves], axis=0, ddof=1)
    stated = np.sqrt(np.mean([np.diag(curve.covariance) for curve in curves], axis=0))
    assert (stated / spread > 0.6).all() and (stated / spread < 1.7).all(), stated / spread
    ends = np.array([curve.accuracies[[2, -1]] for curve in curves])
    correlation = np.mean([curve.covariance[2, -1] for curve in curves]) / stated[2] / stated[-1]
    assert abs(np.corrcoef(ends.T)[0, 1] - correlation) < 0.45 and correlation > 0.2


def test_labels_of_a_group_do_not_help_its_other_images() -> None:
    """Four views each of objects whose labels are random: nothing about new objects can be learned."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(30).repeat_interleave(4)
    labels = groups % 3
    rows = MemoryRows(torch.randn(30, 40, generator=generator)[groups] + 0.05 * torch.randn(120, 40))
    honest = measure_curve(rows, labels, groups, 3, 0, CPU)
    careless = measure_curve(rows, labels, torch.arange(120), 3, 0, CPU)
    assert honest.accuracies.max() < 0.55 < 0.9 < careless.accuracies[-1]


def test_perfect_points_have_some_noise() -> None:
    labels = torch.arange(40) % 2
    rows = MemoryRows(labels[:, None] + 0.01 * torch.randn(40, 3))
    curve = measure_curve(rows, labels, torch.arange(40), 2, 0, CPU)
    assert (curve.accuracies == 1).all()
    assert np.linalg.eigvalsh(curve.covariance).min() > 0
    assert np.sqrt(np.diag(curve.covariance)).min() >= 1 / 40


def test_progress_is_told_of_every_fit_and_a_seed_repeats_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning_curve, "NUM_SUBSETS", 2)
    rows, labels = draw_images(45, 0)
    done: list[int] = []
    given = rows, labels, torch.arange(45), 3
    one = measure_curve(*given, 7, CPU, lambda: done.append(1))
    assert len(done) == count_fits()
    same, other = measure_curve(*given, 7, CPU), measure_curve(*given, 8, CPU)
    assert np.array_equal(one.accuracies, same.accuracies)
    assert np.array_equal(one.covariance, same.covariance)
    assert not np.array_equal(one.accuracies, other.accuracies)
