"""Files that grow aside, for hours perhaps, and get their names at the end. A kill costs seconds.

::

    .NAME.rows.part   rows as they come          -> NAME
    .NAME.bad.part    what could not be used     -> NAME.bad.csv, or nothing
    .NAME.journal     what both belong to, how long they were when they were last saved, and how far that is

What was written after the last save is cut off when the work goes on. No file that is there is replaced.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from finetune.errors import UsageError
from finetune.runs.files import disk_error, sync_folder, write_json

SAVE_SECONDS = 2.0
"""Between two saves: what a kill may cost, and how often the disk has to answer."""


class Growing:
    """Two files that grow together; made by :func:`open_growing`.

    Attributes:
        target: the name that the rows get at the end.
        before: how far an earlier attempt at the same came: what it gave to :meth:`save`.
        is_another: an earlier attempt was at something else; nothing of it is used.
    """

    def __init__(self, target: Path, facts: Mapping[str, Any], rows: BinaryIO, bad: BinaryIO) -> None:
        self.target, self._facts, self._files = target, dict(facts), (rows, bad)
        self._journal = journal_of(target)
        self._saved = time.monotonic()
        journal = _read(self._journal)
        is_same = journal.get("facts") == json.loads(json.dumps(self._facts)) and self._holds(journal)
        self.is_another = bool(journal) and not is_same
        self.before: Mapping[str, Any] | None = journal["progress"] if is_same else None
        self._cut(journal["sizes"] if is_same else (0, 0))

    @property
    def bad_target(self) -> Path:
        """The name that the list of what could not be used gets."""
        return bad_of(self.target)

    def _holds(self, journal: Mapping[str, Any]) -> bool:
        sizes = journal.get("sizes")
        if not isinstance(sizes, list) or len(sizes) != 2 or not isinstance(journal.get("progress"), dict):
            return False
        return all(_size(file) >= size for file, size in zip(self._files, sizes, strict=True))

    def _cut(self, sizes: tuple[int, int]) -> None:
        for file, size in zip(self._files, sizes, strict=True):
            file.truncate(size)
            file.seek(size)

    def start_anew(self) -> None:
        """Forget what an earlier attempt wrote."""
        self.before = None
        self._cut((0, 0))

    def write(self, rows: bytes, bad: bytes = b"") -> None:
        """Append to both."""
        for file, content in zip(self._files, (rows, bad), strict=True):
            file.write(content)

    def save(self, progress: Mapping[str, Any], *, now: bool = False) -> None:
        """Make what was written survive a kill, if the last time is a while ago or it must be now."""
        if not now and time.monotonic() - self._saved < SAVE_SECONDS:
            return
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        sizes = [file.tell() for file in self._files]
        write_json(self._journal, {"facts": self._facts, "sizes": sizes, "progress": dict(progress)})
        self._saved = time.monotonic()

    def finish(self, convert: Callable[[Path, Path], None] | None = None) -> None:
        """Give the files their names; everything was saved.

        Args:
            convert: makes the target from the rows, whole or not at all; by default the rows are the target.
        """
        rows, bad = _parts(self.target)
        if _size(self._files[1]):
            bad.replace(self.bad_target)
        else:
            bad.unlink(missing_ok=True)
        if convert is None:
            rows.replace(self.target)
        else:
            convert(rows, self.target)
            rows.unlink()
        sync_folder(self.target.parent)
        self._journal.unlink(missing_ok=True)

    def discard(self) -> None:
        """Leave nothing but the list of what could not be used."""
        rows, bad = _parts(self.target)
        bad.replace(self.bad_target)
        rows.unlink(missing_ok=True)
        self._journal.unlink(missing_ok=True)


@contextmanager
def open_growing(target: Path, facts: Mapping[str, Any]) -> Iterator[Growing]:
    """Give the files of a target while the block runs, as far as an earlier attempt came.

    Args:
        target: a name that :func:`check_free` found free; its folder is there.
        facts: everything that the content depends on, as JSON. Of others nothing is used.

    Raises:
        UsageError: another process writes them.
        DiskError: they cannot be written.
    """
    try:
        with ExitStack() as stack:
            rows, bad = _parts(target)
            own = stack.enter_context(_open(rows))
            _lock(own, target)
            if _is_own_list(target):
                bad_of(target).replace(bad)
            try:
                yield Growing(target, facts, own, stack.enter_context(_open(bad)))
            finally:
                if not journal_of(target).exists():  # finished, or nothing that could be gone on with
                    for path in _parts(target):
                        path.unlink(missing_ok=True)
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
    sizes, path = _read(journal_of(target)).get("sizes"), bad_of(target)
    if not isinstance(sizes, list) or len(sizes) != 2 or not sizes[1] or os.path.lexists(_parts(target)[1]):
        return False
    return path.is_file() and not path.is_symlink() and path.stat().st_size == sizes[1]


def bad_of(target: Path) -> Path:
    """Return the path of the list of what could not be used."""
    return target.with_name(f"{target.name}.bad.csv")


def journal_of(target: Path) -> Path:
    """Return the path of the journal."""
    return target.with_name(f".{target.name}.journal")


def find_finished(target: Path, facts: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the progress of an attempt at the same that was killed when all but its journal was tidy."""
    journal = _read(journal_of(target))
    is_whole = target.exists() and not _parts(target)[0].exists()
    if not is_whole or journal.get("facts") != json.loads(json.dumps(dict(facts))):
        return None
    journal_of(target).unlink(missing_ok=True)
    progress = journal.get("progress")
    return progress if isinstance(progress, dict) else None


def _parts(target: Path) -> tuple[Path, Path]:
    return target.with_name(f".{target.name}.rows.part"), target.with_name(f".{target.name}.bad.part")


def _open(path: Path) -> BinaryIO:
    """Open for reading and writing, as it is; append mode would undo every ``seek``."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")


def _lock(file: BinaryIO, target: Path) -> None:
    """Keep other processes out; the kernel ends a dead one's lock, and some file systems know none."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        found, fix = "another process is writing it", "Wait for it, or name another --output."
        raise UsageError(f"--output {target}", found, fix) from None
    except OSError:
        return


def _size(file: BinaryIO) -> int:
    file.flush()
    return os.fstat(file.fileno()).st_size


def _read(journal: Path) -> dict[str, Any]:
    try:
        content = json.loads(journal.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
