"""What a reader of folders or tables found, and the words that all of them use."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from finetune.data.sample import Split
from finetune.errors import DataError

SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
SHOWN = 5


@dataclass
class Finding:
    """What a reader found, before the rules common to all layouts are applied.

    Attributes:
        asked: the user's own words, for every refusal.
        root: folder that all paths are relative to.
        parts: paths of each class of each part; a part that is absent was not given.
    """

    asked: str
    root: Path
    parts: dict[Split, dict[str, list[str]]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def refuse(self, found: str, fix: str) -> DataError:
        """Return the refusal, in the user's own words."""
        return DataError(self.asked, found, fix)


def printable(text: object) -> str:
    """Return text that any terminal takes: bytes that are not UTF-8 become escapes."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def names_in(folder: Path) -> list[str]:
    """Return what a folder holds, nothing where it cannot be read."""
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208
    except OSError:
        return []


def some(names: Iterable[str]) -> str:
    """Return the first few names, quoted, and how many more there are."""
    every = [repr(name) for name in names]
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + more


def name_fault(name: str) -> str | None:
    """Say why a class cannot have this name, or return None. Names end up in files, tables and folders."""
    if not name.strip():
        return "is empty"
    if name in {".", ".."} or "/" in name or "\\" in name:
        return "is a path, not a name"
    if any(unicodedata.category(char) in {"Cc", "Zl", "Zp"} for char in name):
        return "holds a control character or a line break"
    return None


def count(number: int, one: str, many: str) -> str:
    """Return a number with its noun."""
    return f"{number} {one if number == 1 else many}"
