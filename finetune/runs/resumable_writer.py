"""Output files that grow under temporary names, perhaps for hours, and are renamed at the end. They resume.

::

    .NAME.rows.part   rows in order                 -> NAME
    .NAME.bad.part    inputs that cannot be used    -> NAME.bad.csv, or nothing
    .NAME.journal     the content of both, block after block (:mod:`finetune.runs.journal`)

Each save appends a block to the journal and flushes it to the disk. Existing files are never replaced.
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
from finetune.runs.files import disk_error, name_result, sync_folder
from finetune.runs.journal import Journal, as_json, count_bytes, read_journal

SAVE_SECONDS = 2.0
"""Seconds between two saves: the most work that a kill can cost."""


class ResumableWriter:
    """Two files that grow together; made by :func:`open_writer`.

    Attributes:
        target: path of the finished rows.
        before: progress of an earlier attempt, as it was given to :meth:`save`; None without one.
        is_another: whether an earlier attempt had other facts, or its files have changed; then nothing of it
            is used.
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
        """Path of the list of inputs that cannot be used."""
        return bad_of(self.target)

    def start_anew(self) -> None:
        """Discard what an earlier attempt wrote."""
        self.before = None
        self._journal.restart()

    def write(self, rows: bytes, bad: bytes = b"") -> None:
        """Append to both files; the next save writes to the disk."""
        for unsaved, content in zip(self._unsaved, (rows, bad), strict=True):
            unsaved.append(content)

    def save(self, progress: Mapping[str, Any], *, now: bool = False) -> None:
        """Save what was written, if the last save is :data:`SAVE_SECONDS` ago or ``now`` is set.

        Args:
            progress: progress of the work, as JSON; a later attempt finds it in :attr:`before`.
            now: whether to save in any case.
        """
        if not now and time.monotonic() - self._saved < SAVE_SECONDS:
            return
        contents = [b"".join(unsaved) for unsaved in self._unsaved]
        self._unsaved = ([], [])
        self._journal.append(contents, dict(progress))
        self._saved = time.monotonic()

    def finish(self, convert: Callable[[Path, Path], None] | None = None) -> None:
        """Rename the files to their final names; everything must have been saved.

        Args:
            convert: writes a file (second argument) from the rows (first argument) atomically, which becomes
                the target; by default the rows become it.

        Raises:
            UsageError: another file has one of the names meanwhile; the rows and the journal are kept.
        """
        rows, bad = _parts(self.target)
        if count_bytes(self._journal.blocks, file=1):
            name_result(bad, self.bad_target, self.target)
        else:
            bad.unlink(missing_ok=True)
        if convert is None:
            name_result(rows, self.target, self.target)
        else:
            whole = self.target.with_name(f".{self.target.name}.part")
            convert(rows, whole)
            name_result(whole, self.target, self.target)
            rows.unlink()
        sync_folder(self.target.parent)
        self._journal.path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove everything except the list of inputs that cannot be used."""
        rows, bad = _parts(self.target)
        name_result(bad, self.bad_target, self.target)
        rows.unlink(missing_ok=True)
        self._journal.path.unlink(missing_ok=True)


@contextmanager
def open_writer(target: Path, facts: Mapping[str, Any]) -> Iterator[ResumableWriter]:
    """Open the output files of a target while the block runs, and resume an earlier attempt.

    Args:
        target: path that :func:`check_free` has found free, in an existing folder.
        facts: everything that the content depends on, as JSON; attempts with other facts are not resumed.

    Raises:
        UsageError: another process writes the files.
        DiskError: the files cannot be written.
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
                if not (journal.blocks and journal.path.exists()):  # finished, or nothing to resume
                    for path in (*_parts(target), journal.path):
                        path.unlink(missing_ok=True)
        finally:
            journal.close()
    except OSError as error:
        raise disk_error(Path(error.filename or target), error) from None


def check_free(target: Path) -> None:
    """Check that neither the rows nor the list of unusable inputs would replace a file.

    Raises:
        UsageError: a file exists that does not come from an earlier attempt at the target.
    """
    for path in (target, bad_of(target)):
        if os.path.lexists(path) and not (path != target and _is_own_list(target)):
            found = "it already exists"
            if path != target:
                found = f"{path.name}, where images that cannot be read are listed, already exists beside it"
            raise UsageError(f"--output {target}", found, "Name another --output, or remove it yourself.")


def _is_own_list(target: Path) -> bool:
    """Return whether an attempt was killed after it had renamed the list, and before it renamed the rows."""
    record, path = read_journal(journal_of(target), 2), bad_of(target)
    size = count_bytes(record.blocks, file=1) if record is not None else 0
    if not size or os.path.lexists(_parts(target)[1]):
        return False
    return path.is_file() and not path.is_symlink() and path.stat().st_size == size


def bad_of(target: Path) -> Path:
    """Return the path of the list of inputs that cannot be used."""
    return target.with_name(f"{target.name}.bad.csv")


def journal_of(target: Path) -> Path:
    """Return the path of the journal."""
    return target.with_name(f".{target.name}.journal")


def find_finished(target: Path, facts: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the progress of a finished attempt that was killed before it removed its journal; else None."""
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
    """Lock the journal; a file system without locks is accepted."""
    is_locked = True
    with suppress(OSError):
        is_locked = journal.lock(fcntl.LOCK_EX)
    if not is_locked or journal.was_removed():  # removed: another process has finished in between
        found, fix = "another process is writing it", "Wait for it, or name another --output."
        raise UsageError(f"--output {target}", found, fix)
