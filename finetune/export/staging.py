"""A folder that is there whole or not at all."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from tempfile import mkdtemp

from finetune.errors import UsageError
from finetune.runs.files import disk_error, sync_folder

STALE = 24 * 60 * 60
"""Seconds after which a folder that is not finished belongs to no living process."""


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Give a folder to write into, which takes its final name when the block ends without an error.

    Args:
        folder: its final name; an older folder of that name is replaced.

    Raises:
        DiskError: it cannot be written.
    """
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        _put_in_place(part, folder)
    except OSError as error:
        raise disk_error(folder, error) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def staged_alone(folder: Path) -> Iterator[Path]:
    """Give a folder as :func:`staged` does, which no other process has, for a name that must stay free.

    Args:
        folder: its final name, which nothing or an empty folder has; the folder above is there.

    Raises:
        UsageError: somebody else has taken the name meanwhile.
        DiskError: it cannot be written.
    """
    prefix, suffix = f".{folder.name}.", ".part"
    try:
        _remove_stale(folder.parent, prefix, suffix)
        part = Path(mkdtemp(suffix, prefix, folder.parent))
    except OSError as error:
        raise disk_error(folder, error) from None
    try:
        part.chmod(0o777 & ~_read_umask())
        yield part
        if folder.is_dir() and any(folder.iterdir()):
            raise UsageError(f"--output {folder}", "another process has filled it", "Name a new folder.")
        part.rename(folder)  # over an empty folder at most, whatever has happened since
        sync_folder(folder.parent)
    except OSError as error:
        raise disk_error(folder, error) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _remove_stale(parent: Path, prefix: str, suffix: str) -> None:
    """What killed processes have left here; a younger one may be in use."""
    for part in parent.glob(f"{escape(prefix)}*{suffix}"):
        if part.is_dir() and time.time() - part.stat().st_mtime > STALE:
            shutil.rmtree(part, ignore_errors=True)


def _read_umask() -> int:
    """The system tells it only when it is set."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def _put_in_place(part: Path, folder: Path) -> None:
    """Exchange a folder: the old one goes only when the new one stands in its place."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        part.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
