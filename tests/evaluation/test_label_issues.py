"""Confident learning, compared with cleanlab if that is installed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from finetune.evaluation.predictions import Predictions
from finetune.evaluation.single_label import compute_thresholds, find_label_issues
from finetune.evaluation.summary import JUDGES
from finetune.targets import MultiLabel, Number


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


# --- several labels, and numbers ---


@pytest.mark.parametrize("seed", range(3))
def test_classes_that_are_missing_or_too_many_are_found(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    true = (torch.rand(400, 3, generator=generator) < 0.3).long()
    logits = torch.randn(400, 3, generator=generator) + 6.0 * true - 3
    wrong = torch.rand(400, 3, generator=generator) < 0.04
    given = torch.where(wrong, 1 - true, true)
    classes = ("a", "b", "c")
    found = JUDGES["multi"].find_issues(Predictions(logits, given.float(), MultiLabel()), classes)
    suggested = torch.zeros(400, 3, dtype=torch.long)
    for issue in found:
        suggested[issue.place] = MultiLabel().encode([issue.suggested], classes)[0].long()
    places = [issue.place for issue in found]
    assert len(places) == len(set(places)) and places != sorted(places)
    right = [place for place in places if torch.equal(suggested[place], true[place])]
    assert len(right) > 0.8 * len(places) and len(right) > 0.6 * int(wrong.any(dim=1).sum())
    values = [issue.values for issue in found]
    assert values == sorted(values) and all(own + other == pytest.approx(1) for own, other in values)


def test_each_class_of_several_is_judged_as_one_of_two() -> None:
    """The images are those that confident learning suspects of the class and of its absence."""
    probabilities, labels, _ = draw(3, num_classes=2)
    truth = torch.stack([labels, 1 - labels], dim=1).float()
    predictions = Predictions(probabilities.flip(1).logit(eps=1e-7), truth, MultiLabel())
    found = JUDGES["multi"].find_issues(predictions, ("one", "zero"))
    assert [issue.place for issue in found] == find_label_issues(labels, probabilities).tolist()
    for issue in found:
        assert issue.suggested == ("zero" if labels[issue.place] else "one")


def test_numbers_with_outlying_errors_are_found_in_their_own_unit() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(500, 1, generator=generator)
    outputs = truth + 0.2 * torch.randn(500, 1, generator=generator) + 0.5  # all are too high by 0.5
    given = truth.clone()
    given[[3, 40, 41]] += torch.tensor([[2.0], [-3.0], [30.0]])
    target = Number(100.0, 10.0)
    found = JUDGES["number"].find_issues(Predictions(outputs, given, target), ("value",))
    assert [issue.place for issue in found] == [41, 40, 3]
    error, far = found[0].values
    assert error == pytest.approx(-295, abs=10) and far == pytest.approx(30 / 0.2, rel=0.15)
    assert float(found[0].suggested) == pytest.approx(float(100 + 10 * outputs[41]), abs=1e-3)


def test_numbers_that_are_all_right_or_all_equal_give_no_issue() -> None:
    truth = torch.linspace(0, 1, 50)[:, None]
    assert JUDGES["number"].find_issues(Predictions(truth, truth, Number()), ("value",)) == []
    noise = torch.randn(300, 1, generator=torch.Generator().manual_seed(1))
    assert JUDGES["number"].find_issues(Predictions(noise, torch.zeros(300, 1), Number()), ("value",)) == []
