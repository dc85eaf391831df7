"""What differs between two recipes."""

from __future__ import annotations

from typing import Any, NamedTuple

from finetune.recipe.schema import Recipe, flatten


class Change(NamedTuple):
    """A key whose value differs between two recipes."""

    key: str
    before: Any
    after: Any

    @property
    def line(self) -> str:
        """``key: before -> after``."""
        return f"{self.key}: {self.before!r} -> {self.after!r}"

    @property
    def is_extension(self) -> bool:
        """Whether the change only makes the same run longer."""
        return self.key == "training.epochs" and self.after > self.before


def changed_keys(before: Recipe, after: Recipe) -> list[Change]:
    """Return every dotted key whose value differs between two recipes."""
    old, new = dict(flatten(before.to_dict())), dict(flatten(after.to_dict()))
    return [Change(key, old[key], new[key]) for key in old if old[key] != new[key]]
