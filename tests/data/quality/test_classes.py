"""Similar class names, and the sizes of classes."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.data.dataset import Dataset, Sample
from finetune.data.quality.classes import compute_imbalance, find_class_issues, find_similar_names


@pytest.mark.parametrize(
    ("classes", "alike"),
    [
        (("cat", "cats", "dog"), [["cat", "cats"]]),
        (("cat ", "cat_", "dog"), [["cat ", "cat_"]]),
        (("golden-retriever", "golden_retriever"), [["golden-retriever", "golden_retriever"]]),
        (("sunflower", "sunflwer", "rose"), [["sunflower", "sunflwer"]]),
        (("sunflower", "sunflomer"), [["sunflomer", "sunflower"]]),
        (("cat", "bat", "rat", "car"), []),
        (("male", "female"), []),
        (("n01443537", "n01443538", "class1", "class2"), []),
        (("glass", "glas"), []),
        (("1.0", "10", "2.5", "25", "v1_2", "v12"), []),
        (("class 1", "class_1"), [["class 1", "class_1"]]),
        (("Cat", "cat"), []),  # said when the data is read
        (("café", "cafés"), [["café", "cafés"]]),
        (("s", "ss", "_", "-"), []),
    ],
)
def test_similar_names_are_found(classes: tuple[str, ...], alike: list[list[str]]) -> None:
    assert [sorted(names) for names in find_similar_names(classes)] == alike


def test_many_names_are_compared_quickly() -> None:
    names = [f"{a}{b}{c}flower" for a in "abcdefgh" for b in "ijklmnop" for c in "qrtuvw"]
    assert find_similar_names([name * 2 for name in names]) == []


def test_tiny_and_imbalanced_classes_are_reported() -> None:
    counts = {"a": 200, "b": 20, "c": 9, "d": 1}
    samples = [
        Sample(f"{name}/{n}.jpg", label, "train")
        for label, (name, number) in enumerate(counts.items())
        for n in range(number)
    ]
    found = {one.code: one for one in find_class_issues(Dataset(Path("/x"), tuple(counts), tuple(samples)))}
    assert found["class-tiny"].count == 1 and "'c'" in found["class-tiny"].message
    assert "200 times" in found["imbalance"].message
    assert compute_imbalance([0, 0]) is None and compute_imbalance([10, 0, 5]) == 2
