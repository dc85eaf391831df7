"""LEEP by hand, at its ends, and on labels that mean nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from finetune.features.transferability import PER_CLASS, compute_leep, compute_normalised_leep


def draw_probabilities(num_images: int, num_classes: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(num_images, num_classes, generator=generator)).softmax(dim=1)


def test_leep_by_hand() -> None:
    probabilities = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    labels = torch.tensor([0, 0, 1, 1])
    # P(y=0, z) = (1.5, 0.5) / 4 and P(z) = (2, 2) / 4, so P(y=0 | z) = (3/4, 1/4); and the reverse for y=1.
    expected = (math.log(1 / 2) + math.log(3 / 4) + math.log(3 / 4) + math.log(1 / 2)) / 4
    assert compute_leep(probabilities, labels, 2) == pytest.approx(expected, rel=1e-9)


def test_leep_by_hand_with_unequal_classes() -> None:
    probabilities = torch.tensor([[0.25, 0.75], [0.5, 0.5], [1.0, 0.0]])
    labels = torch.tensor([2, 0, 0])
    first, second = 0.25 / 1.75, 0.75 / 1.25  # P(y=2 | z)
    expected = math.log(0.25 * first + 0.75 * second) + math.log(1 - (first + second) / 2)
    expected += math.log(1 - first)
    assert compute_leep(probabilities, labels, 3) == pytest.approx(expected / 3, rel=1e-9)


def test_classes_that_follow_from_the_networks_own_reach_the_top() -> None:
    probabilities = torch.eye(6)[torch.tensor([0, 1, 2, 3, 4, 5, 0, 1])]
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 0, 0])
    assert compute_leep(probabilities, labels, 3) == pytest.approx(0, abs=1e-12)
    assert compute_normalised_leep(probabilities, labels, 3, 0) == pytest.approx(1, abs=1e-12)


def test_a_network_that_says_nothing_is_at_the_bottom() -> None:
    labels = torch.arange(4).repeat(10)
    assert compute_normalised_leep(torch.full((40, 8), 1 / 8), labels, 4, 0) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_shuffled_labels_are_near_the_bottom(seed: int) -> None:
    """Somewhat above it: the conditional probabilities are counted on the images that are scored."""
    own = torch.arange(5).repeat_interleave(40)
    probabilities = 0.9 * torch.eye(5)[own] + 0.02
    assert compute_normalised_leep(probabilities, own, 5, seed) > 0.6
    shuffled = own[torch.randperm(200, generator=torch.Generator().manual_seed(seed))]
    assert 0 <= compute_normalised_leep(probabilities, shuffled, 5, seed) < 0.12


@pytest.mark.parametrize("seed", range(3))
def test_bounds(seed: int) -> None:
    probabilities, labels = draw_probabilities(100, 9, seed), torch.arange(5).repeat(20)
    assert -math.log(5) <= compute_leep(probabilities, labels, 5) <= 0
    assert 0 <= compute_normalised_leep(probabilities, labels, 5, seed) <= 1


def test_probabilities_that_underflow() -> None:
    probabilities = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert math.isfinite(compute_leep(probabilities, torch.tensor([0, 1]), 2))


def test_at_most_twenty_images_of_a_class_are_seen() -> None:
    probabilities, labels = draw_probabilities(300, 8, 0), torch.arange(300) % 4 % 3  # 150, 75, 75
    values = {compute_normalised_leep(probabilities, labels, 3, seed) for seed in range(4)}
    assert len(values) == 4  # other images each time
    assert compute_normalised_leep(probabilities, labels, 3, 1) in values  # the same ones for the same seed
    few = torch.cat([(labels == label).nonzero().flatten()[:PER_CLASS] for label in range(3)])
    once = {compute_normalised_leep(probabilities[few], labels[few], 3, seed) for seed in range(4)}
    assert max(once) - min(once) < 1e-9  # all of them, whatever the seed
