"""The registry of the kinds of labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.targets.multi_label import MultiLabel
from finetune.targets.number import Number
from finetune.targets.single_label import SingleLabel
from finetune.targets.target import Target, TargetKind

SINGLE = SingleLabel()
KINDS: tuple[TargetKind, ...] = ("single", "multi", "number")


def name_target(kind: object) -> Target:
    """Return a kind by its name, for tables: numbers are in their own unit; one class for an unknown name."""
    return {"multi": MultiLabel(), "number": Number()}.get(str(kind), SINGLE)


def fit_target(kind: TargetKind, labels: Sequence[str]) -> Target:
    """Return a kind with what it takes from the labels of the training images."""
    if kind == "number":
        return Number.fit(labels)
    return MultiLabel() if kind == "multi" else SINGLE


def read_target(facts: Mapping[str, Any]) -> Target:
    """Return the kind that :meth:`Target.to_facts` described; one class an image if there are no facts.

    Raises:
        ValueError: they are not facts of a kind.
    """
    kind = facts.get("kind", "single")
    try:
        if kind == "number":
            margin = facts.get("margin")
            return Number(
                float(facts["mean"]), float(facts["std"]), None if margin is None else float(margin)
            )
        if kind == "multi":
            return MultiLabel(tuple(map(float, facts.get("thresholds", ()))))
    except (LookupError, TypeError) as error:
        raise ValueError(f"its labels are described by {dict(facts)!r:.100}") from error
    if kind != "single":
        raise ValueError(f"its labels are of the unknown kind {kind!r:.100}")
    return SINGLE
