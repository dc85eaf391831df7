"""A folder of pictures in the user's cache that is made once, and is whole whenever it has its name.

It is written aside under a lock, flushed, and renamed; what killed processes left behind is removed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finetune.cache.shelf import cache_folder
from finetune.errors import DiskError
from finetune.runs.files import disk_error, sync_folder


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
