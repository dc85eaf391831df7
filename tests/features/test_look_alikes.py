"""Groups of look-alikes: bursts are found whole, independent images stay alone, folds keep groups whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finetune.features import look_alikes
from finetune.features.folds import draw_folds
from finetune.features.look_alikes import MOST_IMAGES, find_groups, find_groups_of_small_classes
from finetune.features.ridge import leave_groups_out
from finetune.features.rows import MemoryRows
from finetune.features.transferability import score_neighbours
from finetune.targets import SINGLE

NUM_CLASSES, OBJECTS, VIEWS, FEATURES = 4, 9, 5, 64


def draw_bursts(noise: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features of views of objects, whose labels no feature predicts; labels, and the object of each view."""
    generator = torch.Generator().manual_seed(seed)
    objects = torch.arange(NUM_CLASSES * OBJECTS).repeat_interleave(VIEWS)
    middles = torch.randn(NUM_CLASSES * OBJECTS, FEATURES, generator=generator)
    rows = middles[objects] + noise * torch.randn(len(objects), FEATURES, generator=generator)
    return rows, objects % NUM_CLASSES, objects


def as_rows(matrix: Tensor) -> MemoryRows:
    return MemoryRows(matrix)


def test_bursts_are_found_whole_and_nothing_else() -> None:
    rows, labels, objects = draw_bursts(noise=0.3)
    groups = find_groups(as_rows(rows), torch.arange(len(rows)), labels)
    together = groups[:, None] == groups
    assert torch.equal(together, objects[:, None] == objects)


@pytest.mark.parametrize("seed", range(5))
def test_independent_images_stay_alone(seed: int) -> None:
    rows = torch.randn(180, FEATURES, generator=torch.Generator().manual_seed(seed))
    groups = find_groups(as_rows(rows), torch.arange(180), torch.arange(180) % NUM_CLASSES)
    assert torch.equal(groups, torch.arange(180))


def test_bursts_no_longer_promise_what_new_objects_do_not_keep() -> None:
    """Labels are random by object: a fold with other views of the same objects is predicted all the same."""
    rows, labels, _ = draw_bursts(noise=0.3)
    every, chance = torch.arange(len(rows)), 1 / NUM_CLASSES
    groups = find_groups(as_rows(rows), every, labels)

    def validate(groups: Tensor | None) -> tuple[float, float]:
        hits = leave_groups_out(as_rows(rows), every, labels, NUM_CLASSES, groups=groups)
        near = score_neighbours(as_rows(rows), every, labels, NUM_CLASSES, SINGLE, groups)
        return hits.double().mean().item(), near.mean().item()

    assert min(validate(None)) > 0.9
    assert max(validate(groups)) < 2 * chance


def test_a_class_of_one_burst_is_not_joined() -> None:
    rows = torch.randn(40, FEATURES, generator=torch.Generator().manual_seed(0))
    rows[:20] = rows[0] + 0.01 * rows[:20]
    labels = (torch.arange(40) >= 20).long()
    groups = find_groups(as_rows(rows), torch.arange(40), labels)
    assert len(groups[:20].unique()) > 1


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_few_images_of_a_class(number: int) -> None:
    rows = torch.ones(number + 3, FEATURES)
    labels = torch.tensor([0] * number + [1] * 3)
    assert len(find_groups(as_rows(rows), torch.arange(len(rows)), labels)) == number + 3


def test_named_groups_are_joined_over_classes() -> None:
    rows = torch.randn(8, FEATURES, generator=torch.Generator().manual_seed(0))
    named = ["a", "", "b", "a", "", "b", "a", ""]
    groups = find_groups(as_rows(rows), torch.arange(8), torch.arange(8) % 2, named)
    assert groups[0] == groups[3] == groups[6] and groups[2] == groups[5]
    assert len(groups.unique()) == 5


def test_folds_keep_groups_whole_and_are_the_same_without_any() -> None:
    _, labels, objects = draw_bursts(noise=0.3)
    folds = draw_folds(labels, 5, 0, objects)
    assert all(len(folds[objects == one].unique()) == 1 for one in objects.unique())
    for label in range(NUM_CLASSES):
        assert set(folds[labels == label].tolist()) == set(range(5))
    assert torch.equal(draw_folds(labels, 5, 0), draw_folds(labels, 5, 0, torch.arange(len(labels)) + 7))
    alone = draw_folds(labels, 5, 0, torch.where(labels == 0, 0, objects + 1))
    assert (alone[labels == 0] == -1).all() and (alone[labels > 0] >= 0).all()


def test_a_class_that_is_too_large_to_compare_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_IMAGES >= 2_000
    monkeypatch.setattr("finetune.features.look_alikes.MOST_IMAGES", 10)
    rows, labels, _ = draw_bursts(noise=0.3)
    groups = find_groups(as_rows(rows), torch.arange(len(rows)), labels)
    assert torch.equal(groups, torch.arange(len(rows)))


def test_a_chain_of_images_is_no_burst() -> None:
    steps = torch.arange(40.0)[:, None] * torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    angles = steps[:, 0] / 40
    rows = torch.stack([angles.cos(), angles.sin(), -angles.cos(), -angles.sin()], dim=1)
    groups = find_groups(as_rows(rows), torch.arange(40), torch.zeros(40, dtype=torch.int64))
    assert torch.equal(groups, torch.arange(40))


# --- classes of few images -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_independent_images_of_small_classes_stay_alone(seed: int) -> None:
    """Ten images a class, some typical, some not: the search inside of a class links the typical ones."""
    generator = torch.Generator().manual_seed(seed)
    labels, distances = torch.arange(8).repeat(10), torch.linspace(0.7, 1.6, 80)
    centres = torch.randn(8, FEATURES, generator=generator)
    rows = 2 * centres[labels] + distances[:, None] * torch.randn(80, FEATURES, generator=generator)
    every = torch.arange(80)
    assert find_groups_of_small_classes(as_rows(rows), every, labels).equal(every)
    assert not find_groups(as_rows(rows), every, labels).equal(every)


def test_bursts_of_small_classes_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels, objects = draw_bursts(noise=0.15)
    chosen = (torch.arange(len(rows)) % VIEWS < 3) & (objects < 4 * NUM_CLASSES)  # 12 images a class
    indices, own = chosen.nonzero().flatten(), objects[chosen]
    groups = find_groups_of_small_classes(as_rows(rows), indices, labels[chosen])
    assert torch.equal(groups[:, None] == groups, own[:, None] == own)
    monkeypatch.setattr(look_alikes, "_BLOCK_NUMBERS", 5 * len(indices))
    assert find_groups_of_small_classes(as_rows(rows), indices, labels[chosen]).equal(groups)


def test_named_groups_and_few_images_are_kept() -> None:
    rows = torch.randn(10, 5, generator=torch.Generator().manual_seed(0))
    known = ["a", "", "a", *[""] * 7]
    groups = find_groups_of_small_classes(as_rows(rows), torch.arange(10), torch.arange(10) % 2, known)
    assert groups.tolist() == [0, 1, 0, 3, 4, 5, 6, 7, 8, 9]
