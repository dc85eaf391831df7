"""``progress.json``: how far a run is, for programs that watch it.

The file is replaced as a whole, about once a second, and is not flushed to the disk: after a power cut the
run itself says how far it came.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from finetune.errors import DiskError
from finetune.runs.files import write_bytes

INTERVAL = 0.5
"""Shortest time between two versions of the same phase, in seconds."""


class ProgressFile:
    """Collects facts about a run, and writes them to a file. Threads may share it.

    Args:
        path: the file. A disk that is full or gone ends no run: that version is left out.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._facts: dict[str, Any] = {}
        self._written = -INTERVAL
        self._lock = Lock()

    def update(self, facts: dict[str, Any]) -> None:
        """Take over facts, and write all of them if the last version is old enough.

        Args:
            facts: JSON values by name; those of other names stay as they are.
        """
        with self._lock:
            is_new_phase = facts.get("phase", self._facts.get("phase")) != self._facts.get("phase")
            self._facts |= facts
            now = time.monotonic()
            if is_new_phase or now - self._written >= INTERVAL:
                self._written = now
                self._write()

    def _write(self) -> None:
        content = json.dumps(_finite(self._facts | {"time": round(time.time(), 3)}), allow_nan=False)
        with suppress(DiskError):
            write_bytes(self._path, content.encode() + b"\n", flush=False)


def _finite(value: Any) -> Any:
    """Return a JSON value with null in place of numbers that are not finite, such as a loss that diverged."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
