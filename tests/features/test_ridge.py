"""Images left out of ridge regression: the same as scikit-learn fitted without them, one group at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge, RidgeClassifierCV, RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from torch import Tensor

from finetune.errors import InternalError
from finetune.features import ridge
from finetune.features.ridge import (
    PENALTIES,
    leave_groups_out,
    predict_others,
    score_left_out,
    solve_ridge,
)
from finetune.features.rows import MemoryRows
from finetune.targets import SINGLE, MultiLabel, Number
from tests.features.test_solvers import draw, standardise
from tests.pretend_device import pretended_device

SHAPES = [(60, 12), (40, 90), (30, 30)]
"""Fewer features than images, more, and as many: each is solved from the smaller matrix."""


def leave_out_by_fitting(scaled: Tensor, labels: Tensor, groups: Tensor, num_classes: int) -> Tensor:
    targets = np.where(labels[:, None] == torch.arange(num_classes), 1.0, -1.0)
    errors, hits = [], []
    for penalty in PENALTIES:
        predicted = np.zeros_like(targets)
        for kept, left_out in LeaveOneGroupOut().split(scaled, labels, groups):
            model = Ridge(alpha=penalty * len(labels), solver="cholesky")
            predicted[left_out] = model.fit(scaled[kept], targets[kept]).predict(scaled[left_out])
        errors.append(((targets - predicted) ** 2).sum())
        hits.append(torch.from_numpy(predicted.argmax(axis=1)) == labels)
    return hits[int(np.argmin(errors))]


@pytest.mark.parametrize(("number", "width"), SHAPES)
@pytest.mark.parametrize("group_size", [1, 3, 7])
def test_it_is_what_fitting_without_them_gives(number: int, width: int, group_size: int) -> None:
    rows, labels = draw(number, width, 3, seed=width)
    train = torch.randperm(number, generator=torch.Generator().manual_seed(0))
    groups = torch.randint(number // group_size, (number,), generator=torch.Generator().manual_seed(1))
    groups = torch.arange(number) if group_size == 1 else groups
    hits = leave_groups_out(MemoryRows(rows), train, labels[train], 3, groups=groups)
    expected = leave_out_by_fitting(standardise(rows, train)[train], labels[train], groups, 3)
    assert hits.tolist() == expected.tolist()
    assert 0.3 < hits.float().mean() < 1


@pytest.mark.parametrize(("number", "width"), SHAPES)
@pytest.mark.parametrize("columns", [1, 3])
def test_numbers_are_left_out_by_fitting_without_them(number: int, width: int, columns: int) -> None:
    rows, labels = draw(number, width, 3, seed=width)
    numbers = torch.nn.functional.one_hot(labels, 3).float()[:, :columns] + 0.1 * rows[:, :1]
    groups = torch.arange(number) // 2
    scaled, errors, scores = standardise(rows, torch.arange(number)).numpy(), [], []
    for penalty in PENALTIES:
        model = Ridge(alpha=penalty * number, solver="cholesky")
        predicted = cross_val_predict(model, scaled, numbers, groups=groups, cv=LeaveOneGroupOut())
        predicted = predicted.reshape(number, columns)
        errors.append(((numbers.numpy() - predicted) ** 2).sum())
        scores.append(r2_score(numbers, predicted))
    target = Number() if columns == 1 else MultiLabel()
    every = torch.arange(number)
    found = score_left_out(MemoryRows(rows), every, numbers, columns, target, groups=groups)
    assert found.mean().item() == pytest.approx(scores[int(np.argmin(errors))], abs=1e-6)
    assert not score_left_out(MemoryRows(rows), every, numbers, columns, target, groups=0 * groups).any()


def test_scores_of_classes_are_hits() -> None:
    rows, labels = draw(60, 20, 3)
    groups = torch.arange(60) // 3
    hits = leave_groups_out(MemoryRows(rows), torch.arange(60), labels, 3, groups=groups)
    scores = score_left_out(MemoryRows(rows), torch.arange(60), labels, 3, SINGLE, groups=groups)
    assert scores.tolist() == hits.double().tolist()


@pytest.mark.sample(1)
@pytest.mark.parametrize(("number", "width"), SHAPES)
def test_single_images_are_scikit_learns_ridge_classifier(number: int, width: int) -> None:
    rows, labels = draw(number, width, 4, seed=2)
    scaled = standardise(rows, torch.arange(number)).numpy()
    alphas = np.array(PENALTIES) * number
    model = RidgeClassifierCV(alphas=alphas, store_cv_results=True).fit(scaled, labels)
    errors = model.cv_results_[..., int(np.flatnonzero(alphas == model.alpha_)[0])]  # (N, K), squared
    hits = leave_groups_out(MemoryRows(rows), torch.arange(number), labels, 4)
    own = errors[np.arange(number), labels]
    wrong_if_far = own > 4  # its own output beyond the other label: such an image is predicted wrong
    assert not hits.numpy()[wrong_if_far].any()
    assert hits.float().mean() == pytest.approx(
        leave_out_by_fitting(torch.from_numpy(scaled), labels, torch.arange(number), 4).float().mean()
    )


def test_groups_of_many_sizes_and_small_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels = draw(80, 25, 3)
    groups = torch.arange(80).float().sqrt().long()  # of 1, 3, 5, ... images
    whole = leave_groups_out(MemoryRows(rows), torch.arange(80), labels, 3, groups=groups)
    monkeypatch.setattr(ridge, "_BATCH", 4)
    parts = leave_groups_out(MemoryRows(rows), torch.arange(80), labels, 3, groups=groups)
    assert whole.equal(parts)


def test_labels_at_random_are_recognised_by_chance() -> None:
    """Many features fit any labels: what a label that was left out gave away would show."""
    rows, _ = draw(120, 200, 4)
    hits = leave_groups_out(MemoryRows(rows), torch.arange(120), torch.arange(4).repeat(30), 4)
    assert hits.float().mean() < 0.25 + 3 * (0.25 * 0.75 / 120) ** 0.5


def test_a_class_of_one_image_and_images_of_one_group() -> None:
    rows, labels = draw(21, 6, 2, noise=0.2)
    labels[:20] = torch.arange(20) % 2
    rows[:20] += 1000 * labels[:20, None]
    labels[20] = 2
    every = torch.arange(21)
    assert leave_groups_out(MemoryRows(rows), every, labels, 3).tolist() == [True] * 20 + [False]
    assert not leave_groups_out(MemoryRows(rows), every, labels, 3, groups=torch.zeros_like(every)).any()


def test_images_that_are_all_the_same_are_no_error() -> None:
    hits = leave_groups_out(MemoryRows(torch.ones(10, 4)), torch.arange(10), torch.arange(10) % 2, 2)
    assert hits.float().mean() <= 0.5


def test_a_feature_that_is_not_finite_is_refused() -> None:
    rows, labels = draw(12, 4, 3)
    rows[3, 2] = torch.inf
    with pytest.raises(InternalError, match="not finite"):
        leave_groups_out(MemoryRows(rows), torch.arange(12), labels, 3)


@pytest.mark.parametrize("width", [20, 200])
def test_a_device_finds_the_same(width: int) -> None:
    rows, labels = draw(60, width, 3)
    here = leave_groups_out(MemoryRows(rows), torch.arange(60), labels, 3)
    with pretended_device() as device:
        assert leave_groups_out(MemoryRows(rows), torch.arange(60), labels, 3, device).equal(here)


# --- other images --------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "width"), SHAPES)
def test_others_are_predicted_as_by_scikit_learn(
    number: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the penalty of the smallest squared error left out, from scikit-learn's own leave-one-out."""
    monkeypatch.setattr(ridge, "_BATCH", 16)
    rows, labels = draw(number + 50, width, 3, seed=4, noise=1.5)
    order = torch.randperm(number + 50, generator=torch.Generator().manual_seed(0))
    train, test = order[:number], order[number:]
    scaled = standardise(rows, train).numpy()
    targets = np.where(labels[train, None] == torch.arange(3), 1.0, -1.0)
    alphas = np.array(PENALTIES) * number
    model = RidgeCV(alphas=alphas, store_cv_results=True).fit(scaled[train], targets)
    alpha = alphas[model.cv_results_.mean(axis=(0, 1)).argmin()]
    expected = Ridge(alpha=alpha).fit(scaled[train], targets).predict(scaled[test]).argmax(axis=1)
    predicted = predict_others(MemoryRows(rows), train, labels[train], test, 3)
    assert predicted.tolist() == expected.tolist()
    assert 0.3 < (predicted == labels[test]).float().mean() < 1


def test_training_images_of_one_group_are_left_out_alone() -> None:
    rows, labels = draw(40, 8, 2)
    train, test = torch.arange(30), torch.arange(30, 40)
    one_group = torch.zeros(30, dtype=torch.int64)
    predicted = predict_others(MemoryRows(rows), train, labels[:30], test, 2, groups=one_group)
    assert predicted.equal(predict_others(MemoryRows(rows), train, labels[:30], test, 2))


@pytest.mark.parametrize("width", [10, 200])
def test_ridge_for_numbers_is_scikit_learns_with_the_penalty_of_images_left_out(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    features = 5 + 3 * torch.randn(60, width, generator=generator)
    numbers = (features[:, :3].sum(dim=1) + 4 * torch.randn(60, generator=generator))[:, None]
    weight, bias, penalty = solve_ridge(MemoryRows(features), torch.arange(60), numbers)
    scaled = standardise(features, torch.arange(60)).numpy()
    chosen = RidgeCV([60 * one for one in PENALTIES]).fit(scaled, numbers[:, 0].double().numpy())
    assert penalty == pytest.approx(chosen.alpha_ / 60)
    expected = Ridge(60 * penalty).fit(scaled, numbers[:, 0].double().numpy()).predict(scaled)
    found = (features.double() @ weight.double().T + bias.double())[:, 0].numpy()
    assert found == pytest.approx(expected, abs=1e-3)
