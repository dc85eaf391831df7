"""A folder of results: complete or not at all, written by one process at a time.

::

    NAME/.unfinished/NAME/    the results while they are written; what a killed process left is removed
    NAME/.finished/NAME/      the complete results, while they are moved up; after a kill, the next process
                              moves the rest

Everything lies inside the folder, since it may be a mount point, or all that the user may write to.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finetune.errors import UsageError
from finetune.runs.claim import check_name, create_folder, locked
from finetune.runs.files import disk_error, name_result, remove_folder, sync_folder

_UNFINISHED, _FINISHED = ".unfinished", ".finished"


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder whose content becomes that of ``path`` when the block ends without an error.

    Args:
        path: a folder that is new, empty, or holds only what a killed process of this function left. It is
            created, and removed again if the block fails.

    Raises:
        UsageError: it is a file, holds files, its name is not UTF-8, or another process is writing it.
        DiskError: it cannot be written.
    """
    check_name(path)
    path = Path(os.path.realpath(path))  # "x/.." creates no x
    is_new = not os.path.exists(path)  # noqa: PTH110 - False for a name that is too long
    create_folder(path)
    try:
        with locked(path):
            part = _take(path)
            try:
                yield part
                _finish(path)
            except BaseException:
                remove_folder(part.parent, ignore_errors=True)
                raise
    except BaseException:
        if is_new:
            with suppress(OSError):  # not empty: it is another process's
                path.rmdir()
        raise


def _take(path: Path) -> Path:
    """Remove what a killed process left, and return the folder to write into."""
    try:
        if _is_own(path / _FINISHED):
            _move_up(path)
        if any(not (entry.name == _UNFINISHED and _is_own(entry)) for entry in path.iterdir()):
            raise UsageError(f"--output {path}", "the folder is not empty", "Name a new folder.")
        if (path / _UNFINISHED).exists():
            remove_folder(path / _UNFINISHED)
        part = path / _UNFINISHED / (path.name or "results")  # a report shows the name
        part.mkdir(parents=True)
    except OSError as error:
        raise disk_error(path, error) from None
    return part


def _is_own(folder: Path) -> bool:
    """Return whether a folder is one of this function, and not a link to another's."""
    return folder.is_dir() and not folder.is_symlink()


def _finish(path: Path) -> None:
    try:
        (path / _UNFINISHED).rename(path / _FINISHED)
        _move_up(path)
    except OSError as error:
        raise disk_error(path, error) from None


def _move_up(path: Path) -> None:
    for folder in (path / _FINISHED).iterdir():
        if not _is_own(folder):
            raise UsageError(f"--output {path}", "the folder is not empty", "Name a new folder.")
        for entry in sorted(folder.iterdir()):
            name_result(entry, path / entry.name, path)
        folder.rmdir()
    (path / _FINISHED).rmdir()
    sync_folder(path)
