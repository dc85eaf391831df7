"""Where kept files lie, what they are called, and how much room they may take.

A file's name is the sha256 of the facts that its content depends on: other facts are another file, and
nothing needs to be told stale.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from finetune.errors import DiskError
from finetune.runs.block_file import facts_of, is_in_use, journal_of, remove_unused
from finetune.runs.files import disk_error, free_bytes, sync_folder
from finetune.runs.journal import FORMAT
from finetune.system.display import Display

SPARE_BYTES = 2**30
"""Of the disk that are left alone: checkpoints and other programs need room too."""


def cache_folder(name: str) -> Path:
    """Return a folder in the user's cache (a relative XDG_CACHE_HOME counts as none, says its standard)."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(named) if os.path.isabs(named) else Path(os.path.expanduser("~/.cache"))  # noqa: PTH111, PTH117
    return base.absolute() / "finetune" / name


@dataclass(frozen=True)
class CachedFile:
    """A kept file: what it was made from, its bytes, and when it was last used (seconds since 1970)."""

    path: Path
    facts: Mapping[str, Any]
    num_bytes: int
    used: float


class FeatureCacheDir:
    """The folder of kept files.

    Args:
        max_bytes: that all of them together may take.
        folder: by default ``finetune/kept`` in the user's cache.
    """

    def __init__(self, max_bytes: float = float("inf"), folder: Path | None = None) -> None:
        self.folder, self.max_bytes = folder or cache_folder("kept"), max_bytes

    def path_for(self, facts: Mapping[str, Any]) -> Path:
        """Return the path of the file with this content; ``facts["kind"]`` begins its name."""
        text = json.dumps({"journal": FORMAT, **facts}, sort_keys=True)
        return self.folder / f"{facts['kind']}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.bin"

    def list(self) -> list[CachedFile]:
        """Return every kept file, the longest unused first."""
        kept = []
        for journal in self._journals():
            path = journal.with_suffix(".bin")
            try:
                num_bytes = path.stat().st_size if path.exists() else 0
                kept.append(CachedFile(path, facts_of(path), num_bytes, journal.stat().st_mtime))
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


# --- Waiting while another process writes a file that this one needs ---


_LOOKS = 5
"""At a file before the wait is mentioned: a second. One that is only looked at is free sooner."""


def wait_for_writer(path: Path, words: str, display: Display) -> Callable[[], None]:
    """Return a function to call again and again while another process writes a file.

    It is a sign of life only when the file has grown, so that a writer that hangs is noticed here too.

    Args:
        path: of the bytes.
        words: what the other process does, for people.
        display: where it is said.
    """
    looks, last = count(1), -1

    def look() -> None:
        nonlocal last
        if next(looks) == _LOOKS:
            display.say(f"{words}; this one waits for it")
        try:
            size = path.stat().st_size
        except OSError:
            size = 0
        if size != last:
            last = size
            display.heartbeat.beat()

    return look


# --- A folder of images in the user's cache that is made once, and is whole whenever it has its name ---
#
# It is written aside under a lock, flushed, and renamed; what killed processes left behind is removed.


def make_once(kind: str, name: str, write: Callable[[Path], None]) -> Path:
    """Return a folder of the cache, made now or by an earlier call.

    Args:
        kind: of the cache that it lies in.
        name: other contents have other names.
        write: fills the empty folder that it is given.

    Raises:
        DiskError: there is no room for it, or the cache cannot be written.
    """
    cache = cache_folder(kind)
    folder = cache / name
    with _disk_faults(cache):
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        remove_leftovers(cache)
    if not folder.is_dir():
        with _disk_faults(cache), _locked(cache / f"{name}.lock"):
            if not folder.is_dir():  # another process may have made it while this one waited
                _make(folder, write)
    return folder


@contextmanager
def _disk_faults(cache: Path) -> Iterator[None]:
    """Turn what the operating system says of the cache into a refusal."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise disk_error(cache, error) from None
        fix = "Set XDG_CACHE_HOME to a folder you may write to, and start the same command again."
        raise DiskError(f"writing {cache}", error.strerror or str(error), fix) from None


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Keep other processes from the same folder; give whether the lock was had. It ends with its process."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        had = False
        with suppress(OSError):  # held by another, or a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            had = True
        yield had
    finally:
        os.close(descriptor)


def remove_leftovers(cache: Path) -> None:
    """Remove what killed processes left behind. A lock tells the dead: containers share process numbers."""
    for part in cache.glob("*.part-*"):
        with _locked(cache / f"{part.name.partition('.')[0]}.lock", wait=False) as had:
            if had:
                shutil.rmtree(part, ignore_errors=True)


def _make(folder: Path, write: Callable[[Path], None]) -> None:
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(mode=0o700)
        write(part)
        os.sync()  # else a power cut could keep the new name and lose what is in it
        _rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _rename(part: Path, folder: Path) -> None:
    try:
        part.rename(folder)
    except OSError:
        if not folder.is_dir():  # where there are no locks, another process may have been faster
            raise
    sync_folder(folder.parent)
