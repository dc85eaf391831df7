"""What an answer owes to training images, against solving again without each of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from finetune.features import influence as module
from finetune.features.influence import InfluenceSolver
from finetune.features.rows import MemoryRows
from finetune.features.solvers import TrainingRows, build_training_rows

NUM, CLASSES = 60, 3


def draw(features: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return rows of NUM training images and one more, and the labels of all."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(NUM + 1) % CLASSES
    centres = torch.randn(CLASSES, features, generator=generator) * 0.7
    return centres[labels] + torch.randn(NUM + 1, features, generator=generator), labels


def build(rows: Tensor, labels: Tensor) -> TrainingRows:
    return build_training_rows(MemoryRows(rows), torch.arange(NUM), labels[:NUM], CLASSES)


@pytest.mark.parametrize("features", [8, 200], ids=["few", "projected"])
def test_each_change_is_that_of_solving_again(features: int) -> None:
    """With scikit-learn's solver, on features with the mean and deviation of all training images."""
    rows, labels = draw(features)
    training = build(rows, labels)
    strength = training.strength("softmax", 1.0)
    solver = InfluenceSolver(training, strength)
    point = training.project(torch.tensor([NUM]))[0]
    scores = solver.weights @ point
    answer, other = (int(index) for index in scores.topk(2).indices)
    found = solver.explain(point, answer, other)
    numbers = rows.double().numpy()
    std = numbers[:NUM].std(axis=0)
    scaled = (numbers - numbers[:NUM].mean(axis=0)) / np.maximum(std, 0.1 * std.mean())

    def margin(kept: list[int]) -> tuple[float, int]:
        model = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000)
        decided = model.fit(scaled[kept], labels[kept]).decision_function(scaled[NUM:])[0]
        return float(decided[answer] - decided[other]), int(decided.argmax())

    every = list(range(NUM))
    whole, _ = margin(every)
    assert found.margin == pytest.approx(whole, abs=2e-3)
    assert len(found.single) == module.CANDIDATES
    for left in found.single:
        value, now = margin([image for image in every if image != left.image])
        assert left.change == pytest.approx(value - whole, abs=3e-3) and left.answer == now
    changes = [left.change for left in found.single]
    assert changes == sorted(changes) and changes[0] < 0 < changes[-1]
    for number in (1, len(found.together) // 2, len(found.together)):
        images = solver.estimate(point, answer, other).argsort(stable=True)[:number].tolist()
        _, now = margin([image for image in every if image not in images])
        assert (now != answer) == (number == len(found.together) > 0)


@pytest.mark.parametrize("features", [8, 200], ids=["few", "projected"])
def test_the_estimate_orders_images_as_solving_again_does(features: int) -> None:
    rows, labels = draw(features, seed=1)
    training = build(rows, labels)
    solver = InfluenceSolver(training, training.strength("softmax", 1.0))
    point = training.project(torch.tensor([NUM]))[0]
    answer, other = (int(index) for index in (solver.weights @ point).topk(2).indices)
    estimates = solver.estimate(point, answer, other)
    exact = []
    for image in range(NUM):
        weights = solver._solve_without([image])
        assert weights is not None
        exact.append(float((weights @ point)[answer] - (weights @ point)[other]))
    assert spearmanr(estimates.numpy(), exact).statistic > 0.9
    first = set(np.argsort(exact)[:4].tolist())
    assert len(first & set(estimates.argsort()[: module.CANDIDATES // 2].tolist())) >= 3


def test_the_only_image_of_a_class_is_not_left_out() -> None:
    rows, labels = draw(8)
    labels = labels.clone()
    labels[:NUM] = torch.where(torch.arange(NUM) == 7, 2, torch.arange(NUM) % 2)
    training = build(rows, labels)
    solver = InfluenceSolver(training, training.strength("softmax", 1.0))
    point = training.project(torch.tensor([7]))[0]
    found = solver.explain(point, 2, 0)
    assert all(left.image != 7 for left in found.single) and found.together == ()
    assert solver._solve_without([7]) is None


def test_training_images_keep_their_coordinates() -> None:
    for features in (8, 200):
        rows, labels = draw(features)
        training = build(rows, labels)
        assert torch.allclose(training.project(torch.arange(NUM)), training.matrix, atol=1e-4)
