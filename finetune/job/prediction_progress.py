"""How far a prediction is, and of which pictures: what its journal keeps."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any

from finetune.data.inputs import Input


@dataclass
class Progress:
    """How far the work is.

    Attributes:
        done: pictures that were looked at.
        digest: of their paths, sizes and times.
        bad: of them, could not be read.
        rejected: of them, got no label.
    """

    done: int = 0
    digest: str = ""
    bad: int = 0
    rejected: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return what the journal keeps."""
        return dict(vars(self))


class Fingerprint:
    """Sha256 of the pictures that went by: path, size and time of change of each."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, one: Input) -> None:
        """Count one more."""
        try:
            status = os.stat(one.file)  # noqa: PTH116
            facts = one.fault or f"{status.st_size} {status.st_mtime_ns}"
        except (OSError, ValueError):
            facts = one.fault or "gone"
        self._hash.update(f"{one.path}\0{facts}\n".encode())

    def value(self) -> str:
        """Return the sha256 so far."""
        return self._hash.hexdigest()
