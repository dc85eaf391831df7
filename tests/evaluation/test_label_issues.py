"""Confident learning, compared with cleanlab if that is installed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from finetune.evaluation.label_issues import compute_thresholds, find_label_issues


def draw(seed: int, num_images: int = 400, num_classes: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Return probabilities, labels of which a tenth is wrong, and the indices of those."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.randint(num_classes, (num_images,), generator=generator)
    logits = torch.randn(num_images, num_classes, generator=generator)
    logits[torch.arange(num_images), true] += 4
    wrong = torch.rand(num_images, generator=generator) < 0.1
    shift = torch.randint(1, num_classes, (num_images,), generator=generator)
    return logits.softmax(dim=1), torch.where(wrong, (true + shift) % num_classes, true), wrong


@pytest.mark.parametrize("num_classes", [2, 4, 11])
@pytest.mark.parametrize("seed", range(5))
def test_label_issues_equal_those_of_cleanlab(seed: int, num_classes: int) -> None:
    cleanlab = pytest.importorskip("cleanlab.filter", reason="cleanlab is not installed")
    probabilities, labels, _ = draw(seed, num_classes=num_classes)
    expected = cleanlab.find_label_issues(
        labels.numpy(),
        probabilities.numpy(),
        filter_by="confident_learning",
        return_indices_ranked_by="self_confidence",
        n_jobs=1,
    )
    found = find_label_issues(labels, probabilities).numpy()
    assert len(found) > 5 and np.array_equal(found, expected)


def test_most_wrong_labels_are_found() -> None:
    probabilities, labels, wrong = draw(0)
    found = find_label_issues(labels, probabilities)
    hits = wrong[found].sum().item()
    assert hits / wrong.sum().item() > 0.8 and hits / len(found) > 0.8
    own = probabilities[found, labels[found]]
    assert (own.diff() >= 0).all()


def test_confident_correct_predictions_give_no_label_issue() -> None:
    labels = torch.arange(30) % 3
    assert find_label_issues(labels, torch.eye(3)[labels]).tolist() == []


def test_a_class_without_images_has_an_infinite_threshold() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    probabilities = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.1, 0.9], [0.1, 0.9, 0.0], [0.7, 0.3, 0.0]])
    assert compute_thresholds(labels, probabilities).tolist() == pytest.approx([0.45, 0.6, float("inf")])
    assert find_label_issues(labels, probabilities).tolist() == [3]
