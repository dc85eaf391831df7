"""The wrong answers of each kind of labels, the worst first."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.report.mistakes import list_mistakes
from finetune.targets import SINGLE, MultiLabel, Number


def row(label: str, predicted: str, **others: Any) -> dict[str, Any]:
    return {"path": f"{label}-{predicted}", "label": label, "predicted": predicted, **others}


def test_wrong_classes_are_sorted_by_confidence() -> None:
    rows = [row("a", "b", confidence=0.6), row("a", "a", confidence=1), row("b", "a", confidence=0.99996)]
    first, second = list_mistakes(SINGLE, rows)
    assert (first.outputs, first.said) == (("a", "b"), "with more than 99.9 %")
    assert (second.path, second.said, second.size) == ("a-b", "with 60.0 %", 0.6)


def test_of_several_labels_the_worst_class_is_named() -> None:
    """Right classes do not count, however improbable; where nothing is named, the most improbable absence."""
    rows = [
        row("a|b", "b|c", prob_a="0.3", prob_b="0.51", prob_c="0.8"),
        row("", "a", prob_a="0.9", prob_b="0", prob_c="0"),
        row("b", "", prob_a="0.4", prob_b="0.05", prob_c="0.1"),
        row("b", "b", prob_a="0.4", prob_b="0.5", prob_c="0.1"),
    ]
    found = [(one.outputs, one.said, one.size) for one in list_mistakes(MultiLabel(), rows)]
    assert found == [
        (("b",), "with 5.0 % for b", 0.95),
        (("a",), "with 90.0 % for a", 0.9),
        (("c",), "with 80.0 % for c", 0.8),
    ]


def test_errors_of_numbers_are_sorted_by_size() -> None:
    rows = [row("1", "1"), row("1", "3"), row("2.5", "-1")]
    found = list_mistakes(Number(), rows)
    assert [(one.size, one.said) for one in found] == [(3.5, "off by -3.5"), (2.0, "off by +2")]
    assert {one.outputs for one in found} == {("value",)}


@pytest.mark.parametrize("cell", ["", "x", "nan", "inf", "2"])
def test_damaged_rows_are_left_out(cell: str) -> None:
    rows = [row("a", "b", confidence=cell), row("a", "b"), {"path": "x"}, row("b", "a", confidence="0.9")]
    assert [one.label for one in list_mistakes(SINGLE, rows)] == ["b"]
    several = [row("a", "b", prob_a="0.5", prob_b=cell), row("b", "a", prob_a="1", prob_b="0")]
    assert [one.label for one in list_mistakes(MultiLabel(), several)] == ["b"]
    if cell != "2":
        assert [one.label for one in list_mistakes(Number(), [row("1", cell), row("2", "1")])] == ["2"]
