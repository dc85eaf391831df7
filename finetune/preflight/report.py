"""Everything that one look at a data set says, for a person, a program and the sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.data.check import Checked
from finetune.data.remark import Remark
from finetune.data.sample import Dataset
from finetune.preflight.classes import judge_classes
from finetune.preflight.copies import Copies, find_copies, judge_copies
from finetune.preflight.files import Oddities, find_oddities, judge_oddities, judge_unreadable
from finetune.preflight.groups import judge_groups
from finetune.preflight.near import Near, find_near, judge_near
from finetune.preflight.seen import Seen
from finetune.preflight.summary import summarise

_ORDER = ("error", "warning", "note")


@dataclass(frozen=True, eq=False)
class Report:
    """What was found.

    Attributes:
        remarks: errors first.
        summary: the data set in figures.
        seen: the images.
        copies: exact copies.
        near: near copies.
        oddities: pictures that stand out.
    """

    remarks: tuple[Remark, ...]
    summary: dict[str, Any]
    seen: Seen
    copies: Copies
    near: Near
    oddities: Oddities

    @property
    def errors(self) -> tuple[Remark, ...]:
        """What a run refuses."""
        return tuple(remark for remark in self.remarks if remark.severity == "error")

    def to_dict(self) -> dict[str, Any]:
        """Return what ``check.json`` holds."""
        return to_check(self.remarks, self.summary)


def to_check(remarks: Sequence[Remark], summary: dict[str, Any]) -> dict[str, Any]:
    """Return what ``check.json`` holds."""
    numbers = {severity: sum(one.severity == severity for one in remarks) for severity in _ORDER}
    return {
        "errors": numbers["error"],
        "warnings": numbers["warning"],
        "notes": numbers["note"],
        "findings": [remark.to_dict() for remark in sort_remarks(remarks)],
        "summary": summary,
    }


def sort_remarks(remarks: Sequence[Remark]) -> tuple[Remark, ...]:
    """Return remarks with errors first and notes last."""
    return tuple(sorted(remarks, key=lambda remark: _ORDER.index(remark.severity)))


def inspect(dataset: Dataset, checked: Checked, allow_leaks: bool, said: Sequence[Remark] = ()) -> Report:
    """Judge a data set by one look at its files.

    Args:
        dataset: with its final parts.
        checked: what the look gave.
        allow_leaks: exact copies in two parts are a warning, not an error.
        said: what reading the data has found already.
    """
    seen = Seen(dataset, checked)
    copies, near, oddities = find_copies(seen), find_near(seen), find_oddities(seen)
    remarks = [
        *said,
        *judge_unreadable(seen),
        *judge_copies(seen, copies, allow_leaks),
        *judge_near(seen, near),
        *judge_groups(dataset),
        *judge_classes(dataset),
        *judge_oddities(seen, oddities),
    ]
    return Report(sort_remarks(remarks), summarise(seen), seen, copies, near, oddities)
