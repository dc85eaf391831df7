"""Output files that grow aside, for hours perhaps, and get their names at the end. A kill costs seconds.

::

    .NAME.rows.part   rows as they come          -> NAME
    .NAME.bad.part    what could not be used     -> NAME.bad.csv, or nothing
    .NAME.journal     what both hold, block after block (:mod:`finetune.runs.journal`)

A save is a block of the journal, flushed to the disk. No file that is there is replaced.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from finetune.errors import UsageError
from finetune.runs.files import disk_error, sync_folder
from finetune.runs.journal import Journal, as_json, count_bytes, read_journal

SAVE_SECONDS = 2.0
"""Between two saves: what a kill may cost, and how often the disk has to answer."""


class ResumableWriter:
    """Two files that grow together; made by :func:`open_writer`.

    Attributes:
        target: the name that the rows get at the end.
        before: how far an earlier attempt at the same came: what it gave to :meth:`save`.
        is_another: an earlier attempt was at something else, or its files have changed; nothing of it is
            used.
    """

    def __init__(self, target: Path, journal: Journal) -> None:
        self.target, self._journal = target, journal
        self._unsaved: tuple[list[bytes], list[bytes]] = ([], [])
        self._saved = time.monotonic()
        earlier = read_journal(journal.path, 2)
        is_same = journal.load()
        self.before: Mapping[str, Any] | None = journal.blocks[-1].note if journal.blocks else None
        self.is_another = not is_same and earlier is not None and bool(earlier.blocks)
        if self.before is None:
            journal.restart()
        journal.open_files()

    @property
    def bad_target(self) -> Path:
        """The name that the list of what could not be used gets."""
        return bad_of(self.target)

    def start_anew(self) -> None:
        """Forget what an earlier attempt wrote."""
        self.before = None
        self._journal.restart()

    def write(self, rows: bytes, bad: bytes = b"") -> None:
        """Append to both; they reach the disk with the next save."""
        for unsaved, content in zip(self._unsaved, (rows, bad), strict=True):
            unsaved.append(content)

    def save(self, progress: Mapping[str, Any], *, now: bool = False) -> None:
        """Make what was written survive a kill, if the last time is a while ago or it must be now."""
        if not now and time.monotonic() - self._saved < SAVE_SECONDS:
            return
        contents = [b"".join(unsaved) for unsaved in self._unsaved]
        self._unsaved = ([], [])
        self._journal.append(contents, dict(progress))
        self._saved = time.monotonic()

    def finish(self, convert: Callable[[Path, Path], None] | None = None) -> None:
        """Give the files their names; everything was saved.

        Args:
            convert: makes the target from the rows, whole or not at all; by default the rows are the target.
        """
        rows, bad = _parts(self.target)
        if count_bytes(self._journal.blocks, file=1):
            bad.replace(self.bad_target)
        else:
            bad.unlink(missing_ok=True)
        if convert is None:
            rows.replace(self.target)
        else:
            convert(rows, self.target)
            rows.unlink()
        sync_folder(self.target.parent)
        self._journal.path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Leave nothing but the list of what could not be used."""
        rows, bad = _parts(self.target)
        bad.replace(self.bad_target)
        rows.unlink(missing_ok=True)
        self._journal.path.unlink(missing_ok=True)


@contextmanager
def open_writer(target: Path, facts: Mapping[str, Any]) -> Iterator[ResumableWriter]:
    """Give the files of a target while the block runs, as far as an earlier attempt came.

    Args:
        target: a name that :func:`check_free` found free; its folder is there.
        facts: everything that the content depends on, as JSON. Of others nothing is used.

    Raises:
        UsageError: another process writes them.
        DiskError: they cannot be written.
    """
    try:
        journal = Journal(journal_of(target), _parts(target), facts, durable=True)
        try:
            _lock(journal, target)
            if _is_own_list(target):
                bad_of(target).replace(_parts(target)[1])
            try:
                yield ResumableWriter(target, journal)
            finally:
                if not (journal.blocks and journal.path.exists()):  # finished, or nothing to go on with
                    for path in (*_parts(target), journal.path):
                        path.unlink(missing_ok=True)
        finally:
            journal.close()
    except OSError as error:
        raise disk_error(target, error) from None


def check_free(target: Path) -> None:
    """Make sure that neither the rows nor the list of what could not be used replace a file.

    Raises:
        UsageError: there is one already, which no attempt at the target has left.
    """
    for path in (target, bad_of(target)):
        if os.path.lexists(path) and not (path != target and _is_own_list(target)):
            found = "there is something of that name already"
            if path != target:
                found = f"there is {path.name} beside it already, where images that cannot be read are listed"
            raise UsageError(f"--output {target}", found, "Name another --output, or remove it yourself.")


def _is_own_list(target: Path) -> bool:
    """Tell whether an attempt was killed after it gave the list its name, and before the rows had theirs."""
    record, path = read_journal(journal_of(target), 2), bad_of(target)
    size = count_bytes(record.blocks, file=1) if record is not None else 0
    if not size or os.path.lexists(_parts(target)[1]):
        return False
    return path.is_file() and not path.is_symlink() and path.stat().st_size == size


def bad_of(target: Path) -> Path:
    """Return the path of the list of what could not be used."""
    return target.with_name(f"{target.name}.bad.csv")


def journal_of(target: Path) -> Path:
    """Return the path of the journal."""
    return target.with_name(f".{target.name}.journal")


def find_finished(target: Path, facts: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the progress of an attempt at the same that was killed when all but its journal was tidy."""
    record = read_journal(journal_of(target), 2)
    is_whole = target.exists() and not _parts(target)[0].exists()
    if not is_whole or record is None or record.facts != as_json(facts) or not record.blocks:
        return None
    journal_of(target).unlink(missing_ok=True)
    progress = record.blocks[-1].note
    return progress if isinstance(progress, dict) else None


def _parts(target: Path) -> tuple[Path, Path]:
    return target.with_name(f".{target.name}.rows.part"), target.with_name(f".{target.name}.bad.part")


def _lock(journal: Journal, target: Path) -> None:
    """Keep other processes out; the kernel ends a dead one's lock, and some file systems know none."""
    is_ours = True
    with suppress(OSError):
        is_ours = journal.lock(fcntl.LOCK_EX)
    if not is_ours or journal.was_removed():  # removed: the other one has finished in between
        found, fix = "another process is writing it", "Wait for it, or name another --output."
        raise UsageError(f"--output {target}", found, fix)
