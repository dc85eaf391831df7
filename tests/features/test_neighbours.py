"""Nearest neighbours against scikit-learn, in blocks of every size, and with ties."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from torch import Tensor

from finetune.features import transferability as neighbours
from finetune.features.rows import FileRows, MemoryRows
from finetune.features.transferability import classify, score_neighbours
from finetune.targets import SINGLE, MultiLabel


def draw(num_rows: int, width: int, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows whose class shifts them a little, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_rows,), generator=generator)
    centres = torch.randn(num_classes, width, generator=generator)
    return torch.randn(num_rows, width, generator=generator) * 2 + centres[labels], labels


def build_reference() -> KNeighborsClassifier:
    def weigh(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / 0.07)

    return KNeighborsClassifier(5, weights=weigh, metric="cosine")


@pytest.mark.parametrize("seed", range(3))
def test_classes_are_scikit_learns(seed: int) -> None:
    rows, labels = draw(160, 12, 6, seed)
    train, test = torch.arange(100), torch.arange(100, 160)
    found = classify(MemoryRows(rows), train, labels[train], test, 6)
    expected = build_reference().fit(rows[train], labels[train]).predict(rows[test])
    assert found.tolist() == expected.tolist()
    assert 0.3 < (found == labels[test]).float().mean() < 0.9  # neither all right nor by chance


def test_leaving_one_out_is_scikit_learns() -> None:
    rows, labels = draw(80, 12, 4, 3)
    predicted = cross_val_predict(build_reference(), rows, labels, cv=LeaveOneOut())
    hits = score_neighbours(MemoryRows(rows), torch.arange(80), labels, 4, SINGLE)
    assert hits.bool().tolist() == (predicted == labels.numpy()).tolist()


def test_numbers_are_scikit_learns_means() -> None:
    rows, labels = draw(80, 12, 4, 3)
    numbers = torch.nn.functional.one_hot(labels, 4).float()
    model = KNeighborsRegressor(5, weights=build_reference().weights, metric="cosine")
    predicted = cross_val_predict(model, rows, numbers, cv=LeaveOneOut())
    scores = score_neighbours(MemoryRows(rows), torch.arange(80), numbers, 4, MultiLabel())
    assert scores.mean().item() == pytest.approx(r2_score(numbers, predicted), abs=1e-5)


def test_only_the_chosen_images_count() -> None:
    rows, labels = draw(90, 12, 4, 4)
    chosen = torch.randperm(90, generator=torch.Generator().manual_seed(0))[:50]
    alone = score_neighbours(MemoryRows(rows[chosen]), torch.arange(50), labels[chosen], 4, SINGLE)
    assert score_neighbours(MemoryRows(rows), chosen, labels[chosen], 4, SINGLE).equal(alone)


@pytest.mark.parametrize("num_bytes", [1, 4 * 70 * 3, 4 * 70 * 33])
def test_blocks_change_nothing(num_bytes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows, labels = draw(70, 12, 4, 5)
    whole = score_neighbours(MemoryRows(rows), torch.arange(70), labels, 4, SINGLE)
    rows.numpy().tofile(tmp_path / "rows")
    monkeypatch.setattr(neighbours, "_BLOCK_BYTES", num_bytes)
    kept = FileRows(tmp_path / "rows", (70, 12), torch.float32)
    assert score_neighbours(kept, torch.arange(70), labels, 4, SINGLE).equal(whole)


def test_of_equally_near_images_the_first_vote() -> None:
    rows = torch.eye(3)[torch.tensor([0] * 9 + [1] * 3)]  # nine in one direction, three in another
    train = torch.arange(12)
    labels = torch.tensor([2, 1, 2, 1, 2, 0, 0, 0, 0, 3, 3, 3])
    test = torch.tensor([0, 9])
    assert classify(MemoryRows(rows), train, labels, test, 4).tolist() == [2, 3]
    turned = train.flip(0)
    assert classify(MemoryRows(rows), turned, labels.flip(0), test, 4).tolist() == [0, 3]


def test_of_equal_votes_the_lowest_class_wins() -> None:
    rows = MemoryRows(torch.ones(5, 2))
    assert classify(rows, torch.arange(4), torch.tensor([3, 1, 3, 1]), torch.tensor([4]), 4).tolist() == [1]


def test_near_images_outvote_many_far_ones() -> None:
    angles = torch.tensor([0.0, 0.02, 1.0, 1.0, 1.0, 1.0])
    rows = MemoryRows(torch.stack([angles.cos(), angles.sin()], dim=1))
    train = torch.arange(1, 6)
    assert classify(rows, train, torch.tensor([0, 1, 1, 1, 1]), torch.tensor([0]), 2).tolist() == [0]


def test_fewer_images_than_neighbours() -> None:
    rows = MemoryRows(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]))
    assert score_neighbours(rows, torch.arange(3), torch.tensor([0, 0, 1]), 2, SINGLE).tolist() == [1, 1, 0]


def test_an_image_without_features_is_near_to_none() -> None:
    rows = torch.cat([torch.zeros(1, 3), torch.eye(3)])
    found = classify(MemoryRows(rows), torch.arange(1, 4), torch.tensor([2, 1, 0]), torch.tensor([0]), 3)
    assert found.tolist() == [0]  # three equal votes, and no number that is none
