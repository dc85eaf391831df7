"""Classes that imply another, images without a class, and numbers that are far off."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from finetune.data.dataset import Dataset, Issue, Sample
from finetune.data.quality.labels import find_label_issues
from finetune.targets import SINGLE, MultiLabel, Number, Target


def find(target: Target, labels: Sequence[str]) -> dict[str, Issue]:
    texts = tuple(sorted(set(labels)))
    samples = tuple(Sample(f"{n}.jpg", texts.index(label), "train") for n, label in enumerate(labels))
    names = target.name_outputs(labels)
    dataset = Dataset(Path("/x"), names, samples, target=target, label_texts=texts)
    return {issue.code: issue for issue in find_label_issues(dataset)}


def test_a_class_that_is_always_with_another_is_named() -> None:
    found = find(MultiLabel(), ["dog|puppy"] * 12 + ["dog"] * 20 + ["cat"] * 9 + ["cat|dog"] * 2)
    assert set(found) == {"label-implied"}
    assert "puppy (12) always with dog (34)" in found["label-implied"].message
    assert found["label-implied"].count == 1


@pytest.mark.parametrize("labels", [["dog|puppy"] * 9 + ["dog"] * 20, ["a|b"] * 30 + ["a"] * 1 + ["b"] * 1])
def test_few_images_and_exceptions_imply_nothing(labels: list[str]) -> None:
    assert find(MultiLabel(), labels) == {}


def test_images_without_a_class_are_counted() -> None:
    issue = find(MultiLabel(), ["a", "", "b", ""])["label-none"]
    assert (issue.severity, issue.count, issue.paths) == ("note", 2, ("1.jpg", "3.jpg"))


def test_numbers_that_are_far_off_are_named() -> None:
    values = [f"{20 + n % 7}" for n in range(50)]
    found = find(Number(), [*values, "2000", "-999"])
    assert found["number-far"].count == 2
    assert "2000 (50.jpg)" in found["number-far"].message and "-999 (51.jpg)" in found["number-far"].message
    assert find(Number(), values) == {} == find(Number(), ["1"] * 30 + ["9"])


def test_single_classes_have_none_of_them() -> None:
    assert find(SINGLE, ["a"] * 20 + ["b"] * 30) == {}
    assert [*find_label_issues(Dataset(Path("/x"), (), (Sample("x.jpg", -1, "train"),)))] == []
