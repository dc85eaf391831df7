"""Files and folders that last as long as a command, in the folder for temporary files (``TMPDIR``).

No other module makes them (tests/test_architecture.py): where that folder is missing, full or not writable,
the error says so.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from finetune.errors import DiskError

_NONE_USABLE = "No usable temporary directory"


@contextmanager
def temporary_folder(prefix: str = "finetune-") -> Iterator[Path]:
    """Yield a new folder, which is removed when the block ends.

    Raises:
        DiskError: it cannot be created.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix=prefix)
    except OSError as error:
        raise _disk_error(error) from None
    with folder as name:
        yield Path(name)


def temporary_file(mode: str = "w+b", encoding: str | None = None) -> IO[Any]:
    """Return a new file without a name, which is removed when it is closed.

    Raises:
        DiskError: it cannot be created.
    """
    try:
        return tempfile.TemporaryFile(mode, encoding=encoding)
    except OSError as error:
        raise _disk_error(error) from None


def find_temporary_fault(error: Exception) -> DiskError | None:
    """Return the DiskError for a library that found no folder for its temporary files; None for others."""
    if isinstance(error, FileNotFoundError) and _NONE_USABLE in str(error):
        return _disk_error(error)
    return None


def _disk_error(error: OSError) -> DiskError:
    where = "the folder for temporary files"
    with suppress(OSError):
        where = tempfile.gettempdir()
    fix = "Free some space, or set TMPDIR to a folder you may write to, and start the same command again."
    return DiskError(f"writing a temporary file into {where}", error.strerror or str(error), fix)
