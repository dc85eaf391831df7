"""The cache: where its files are, how they are named, and how much space they may take.

The name of a file contains the sha256 of the facts that its content depends on. Other facts give another
file, so a file never becomes stale.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from finetune.errors import DiskError
from finetune.runs.block_file import facts_of, is_in_use, journal_of, remove_unused
from finetune.runs.files import disk_error, free_bytes, remove_folder, sync_folder
from finetune.runs.journal import FORMAT
from finetune.system.display import Display
from finetune.system.regular_files import open_own

SPARE_BYTES = 2**30
"""Bytes of the disk that stay free for checkpoints and other programs."""


def cache_folder(name: str) -> Path:
    """Return a folder in the user's cache (the standard says to ignore a relative XDG_CACHE_HOME)."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(named) if os.path.isabs(named) else Path(os.path.expanduser("~/.cache"))  # noqa: PTH111, PTH117
    return base.absolute() / "finetune" / name


@dataclass(frozen=True)
class CachedFile:
    """A cached file: what it is made from, its size, and when it was last used (seconds since 1970)."""

    path: Path
    facts: Mapping[str, Any]
    num_bytes: int
    used: float


class FeatureCacheDir:
    """The folder of cached files: features and decoded images.

    Args:
        max_bytes: largest size of all files together.
        folder: path of the folder; by default ``finetune/kept`` in the user's cache.
    """

    def __init__(self, max_bytes: float = float("inf"), folder: Path | None = None) -> None:
        self.folder, self.max_bytes = folder or cache_folder("kept"), max_bytes

    def path_for(self, facts: Mapping[str, Any]) -> Path:
        """Return the path of the file made from these facts; its name begins with ``facts["kind"]``."""
        text = json.dumps({"journal": FORMAT, **facts}, sort_keys=True)
        return self.folder / f"{facts['kind']}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.bin"

    def list(self) -> list[CachedFile]:
        """Return every cached file, the least recently used first."""
        kept = []
        for journal in self._files("*.journal"):
            path = journal.with_suffix(".bin")
            try:
                num_bytes = path.stat().st_size if path.exists() else 0
                kept.append(CachedFile(path, facts_of(path), num_bytes, journal.stat().st_mtime))
            except OSError:  # removed in between
                continue
        return sorted(kept, key=lambda file: file.used)

    def _files(self, pattern: str) -> Sequence[Path]:
        try:
            return list(self.folder.glob(pattern))
        except OSError:  # another user's folder
            return []

    def find_obstacle(self, num_bytes: int) -> str:
        """Return why ``num_bytes`` more do not fit, even without all unused files; "" if they fit."""
        removable = used = 0
        for file in self.list():
            if is_in_use(file.path):
                used += file.num_bytes
            else:
                removable += file.num_bytes
        if num_bytes + used > self.max_bytes:
            return f"more than cache.max_gb={self.max_bytes / 1e9:g} allows"
        free = free_bytes(self.folder)
        if free is not None and num_bytes + SPARE_BYTES > free + removable:
            return f"and the disk has {free / 1e9:.1f} GB free"
        return ""

    def make_room(self, num_bytes: int) -> None:
        """Remove the least recently used files that no process uses, until ``num_bytes`` more fit."""
        files = self.list()
        total = sum(file.num_bytes for file in files)
        for file in files:
            free = free_bytes(self.folder)
            fits_disk = free is None or num_bytes + SPARE_BYTES <= free
            if total + num_bytes <= self.max_bytes and fits_disk:
                return
            if remove_unused(file.path):
                total -= file.num_bytes

    def clear(self) -> tuple[int, int]:
        """Remove every file that no process uses; return the number of files, and their bytes."""
        removed = [file for file in self.list() if remove_unused(file.path)]
        for leftover in self._files("*.bin"):
            with suppress(OSError):
                if not journal_of(leftover).exists():
                    leftover.unlink(missing_ok=True)
        return len(removed), sum(file.num_bytes for file in removed)


# --- waiting while another process writes a file that this one needs ------------------------------

_SILENT_CHECKS = 5
"""Checks of a file before a message is shown, one second in all: a lock for a short check is gone by then."""


def wait_for_writer(path: Path, message: str, display: Display) -> Callable[[], None]:
    """Return a function to call repeatedly while another process writes a file.

    It sends a heartbeat only if the file has grown, so that the supervisor notices a writer that hangs.

    Args:
        path: path of the bytes.
        message: what the other process does, for the user.
        display: shows the message.
    """
    checks, last = count(1), -1

    def check() -> None:
        nonlocal last
        if next(checks) == _SILENT_CHECKS:
            display.say(f"{message}; this one waits for it")
        try:
            size = path.stat().st_size
        except OSError:
            size = 0
        if size != last:
            last = size
            display.heartbeat.beat()

    return check


# --- a folder of images in the user's cache that is made once -------------------------------------
#
# It is written under a temporary name and a lock, flushed, and renamed, so that a folder with the final name
# is complete. What killed processes have left is removed.


def make_once(kind: str, name: str, write: Callable[[Path], None]) -> Path:
    """Return a folder of the cache, made by this call or an earlier one.

    Args:
        kind: name of the folder above, such as ``archives``.
        name: name of the folder; different contents must have different names.
        write: fills the empty folder that it is given.

    Raises:
        DiskError: the disk is full, or the cache cannot be written.
    """
    cache = cache_folder(kind)
    folder = cache / name
    with cache_faults(cache):
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        remove_leftovers(cache)
    if not folder.is_dir():
        with cache_faults(cache), _locked(cache / f"{name}.lock"):
            if not folder.is_dir():  # another process may have made it while this one waited
                _make(folder, write)
    return folder


@contextmanager
def cache_faults(cache: Path) -> Iterator[None]:
    """Turn an OSError about the cache into a DiskError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise disk_error(cache, error) from None
        fix = "Set XDG_CACHE_HOME to a folder you may write to, and start the same command again."
        raise DiskError(f"writing {cache}", error.strerror or str(error), fix) from None


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Lock a file while the block runs, and remove it; yield whether it is locked.

    The lock ends with its process. Who has waited for it locks the file that now has the name.
    """
    descriptor, is_locked = _lock(path, wait)
    while is_locked and not _is_file(descriptor, path):
        os.close(descriptor)
        descriptor, is_locked = _lock(path, wait)
    try:
        yield is_locked
    finally:
        if is_locked:
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path, wait: bool) -> tuple[int, bool]:
    """Open a file, which is created, and lock it; return its descriptor, and whether it is locked.

    A link is refused, since the file that it leads to would be locked, or created.
    """
    descriptor = open_own(path, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # another process has it, or the file system has no locks
        return descriptor, False
    return descriptor, True


def _is_file(descriptor: int, path: Path) -> bool:
    """Return whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))  # noqa: PTH116
    except OSError:
        return False


def remove_leftovers(cache: Path) -> None:
    """Remove what killed processes have left: unlocked folders (process ids repeat between containers)."""
    for part in cache.glob("*.part-*"):
        with _locked(cache / f"{part.name.partition('.')[0]}.lock", wait=False) as is_locked:
            if is_locked:
                remove_folder(part, ignore_errors=True)


def _make(folder: Path, write: Callable[[Path], None]) -> None:
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    remove_folder(part, ignore_errors=True)
    try:
        part.mkdir(mode=0o700)
        write(part)
        os.sync()  # otherwise a power cut could keep the new name and lose the content
        _rename(part, folder)
    finally:
        remove_folder(part, ignore_errors=True)


def _rename(part: Path, folder: Path) -> None:
    try:
        part.rename(folder)
    except OSError:
        if not folder.is_dir():  # without locks another process may have been faster
            raise
    sync_folder(folder.parent)
