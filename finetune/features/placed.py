"""The files that an extraction has placed in its folder, told from other files of the same names.

A process that is killed leaves some tables under their final names, and the next one neither computes them
again nor replaces files of others. So ``extraction.json`` says what a file will be known by, before it gets
its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.runs.files import name_result, read_object, write_json

KEY = "placed"
"""Key of the record: for each name, size, time in nanoseconds and inode of what was placed there."""


class PlacedFiles:
    """The files in the folder of an extraction that earlier processes or this one have placed there.

    Args:
        record: the record of the extraction, which exists.
    """

    def __init__(self, record: Path) -> None:
        self._record, self._facts = record, read_object(record)
        self._known = read_placed(self._facts)

    def holds(self, path: Path) -> bool:
        """Return whether a file was placed by this extraction, and has not changed since."""
        try:
            return _identify(path) in self._known.get(path.name, [])
        except OSError:
            return False

    def place(self, part: Path, path: Path) -> None:
        """Give a file its name; what this extraction has placed there is replaced, and nothing else.

        Raises:
            UsageError: another file has the name; nothing has changed but the record.
            DiskError: the record cannot be written.
        """
        is_own = self.holds(path)
        self._known.setdefault(path.name, []).append(_identify(part))
        write_json(self._record, self._facts | self.entry)
        if is_own:
            part.replace(path)
        else:
            name_result(part, path, path.parent)

    @property
    def entry(self) -> dict[str, Any]:
        """The entry of the record."""
        return {KEY: self._known}


def read_placed(record: Mapping[str, Any] | None) -> dict[str, list[Any]]:
    """Return what a record says of the files that were placed; a damaged entry counts as absent."""
    placed = (record or {}).get(KEY)
    if not isinstance(placed, dict):
        return {}
    return {name: known for name, known in placed.items() if isinstance(known, list)}


def _identify(path: Path) -> list[int]:
    status = path.lstat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]
