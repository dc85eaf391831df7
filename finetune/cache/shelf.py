"""Where kept files lie, what they are called, and how much room they may take.

A file's name is the sha256 of the facts that its content depends on: other facts are another file, and
nothing needs to be told stale.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.cache.blocks import facts_of, is_in_use, journal_of, remove_unused
from finetune.runs.files import free_bytes
from finetune.runs.journal import FORMAT

SPARE_BYTES = 2**30
"""Of the disk that are left alone: checkpoints and other programs need room too."""


def cache_folder(name: str) -> Path:
    """Return a folder in the user's cache (a relative XDG_CACHE_HOME counts as none, says its standard)."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(named) if os.path.isabs(named) else Path(os.path.expanduser("~/.cache"))  # noqa: PTH111, PTH117
    return base.absolute() / "finetune" / name


@dataclass(frozen=True)
class Kept:
    """A kept file: what it was made from, its bytes, and when it was last used (seconds since 1970)."""

    path: Path
    facts: Mapping[str, Any]
    num_bytes: int
    used: float


class Shelf:
    """The folder of kept files.

    Args:
        max_bytes: that all of them together may take.
        folder: by default ``finetune/kept`` in the user's cache.
    """

    def __init__(self, max_bytes: float = float("inf"), folder: Path | None = None) -> None:
        self.folder, self.max_bytes = folder or cache_folder("kept"), max_bytes

    def place(self, facts: Mapping[str, Any]) -> Path:
        """Return the path of the file with this content; ``facts["kind"]`` begins its name."""
        text = json.dumps({"journal": FORMAT, **facts}, sort_keys=True)
        return self.folder / f"{facts['kind']}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.bin"

    def list(self) -> list[Kept]:
        """Return every kept file, the longest unused first."""
        kept = []
        for journal in self._journals():
            path = journal.with_suffix(".bin")
            try:
                num_bytes = path.stat().st_size if path.exists() else 0
                kept.append(Kept(path, facts_of(path), num_bytes, journal.stat().st_mtime))
            except OSError:  # removed in between
                continue
        return sorted(kept, key=lambda one: one.used)

    def _journals(self) -> Sequence[Path]:
        try:
            return list(self.folder.glob("*.journal"))
        except OSError:  # another user's folder
            return []

    def find_obstacle(self, num_bytes: int) -> str:
        """Say why so many bytes more cannot be kept, beside what is in use; nothing where they can."""
        removable = used = 0
        for one in self.list():
            if is_in_use(one.path):
                used += one.num_bytes
            else:
                removable += one.num_bytes
        if num_bytes + used > self.max_bytes:
            return f"more than cache.max_gb={self.max_bytes / 1e9:g} allows"
        free = free_bytes(self.folder)
        if free is not None and num_bytes + SPARE_BYTES > free + removable:
            return f"and the disk has {free / 1e9:.1f} GB free"
        return ""

    def make_room(self, num_bytes: int) -> None:
        """Remove what was not used for longest and is not in use, until so many bytes more fit."""
        kept = self.list()
        total = sum(one.num_bytes for one in kept)
        for one in kept:
            free = free_bytes(self.folder)
            fits_disk = free is None or num_bytes + SPARE_BYTES <= free
            if total + num_bytes <= self.max_bytes and fits_disk:
                return
            if remove_unused(one.path):
                total -= one.num_bytes

    def clear(self) -> tuple[int, int]:
        """Remove everything that no process uses; return how many files that were, and their bytes."""
        removed = [one for one in self.list() if remove_unused(one.path)]
        with suppress(OSError):
            for leftover in self.folder.glob("*.bin"):
                if not journal_of(leftover).exists():
                    leftover.unlink(missing_ok=True)
        return len(removed), sum(one.num_bytes for one in removed)
