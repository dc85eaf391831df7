"""Open files that others may have prepared.

Only regular files are opened, so that a pipe never blocks and no device fills the memory. Files are never
written through a link, so that no other file is overwritten.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path
from typing import TextIO

_KINDS = (
    (stat.S_ISDIR, errno.EISDIR, "it is a folder"),
    (stat.S_ISFIFO, errno.EINVAL, "it is a named pipe, not a file"),
)


def open_regular(path: Path) -> io.BufferedReader:
    """Open a file for reading, through links too.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe or a device; its ``strerror`` says so.
    """
    # O_NONBLOCK, since opening a pipe would wait for its other end. It changes nothing for a file on a disk.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    _check(descriptor, path)
    return os.fdopen(descriptor, "rb")


def open_text(path: Path) -> TextIO:
    """Open a file of UTF-8 text for reading, as :func:`open_regular` does; its line ends stay as they are.

    Raises:
        OSError: as :func:`open_regular`.
    """
    return io.TextIOWrapper(open_regular(path), encoding="utf-8", newline="")


def open_to_update(path: Path) -> io.BufferedRandom:
    """Open a file of our own for reading and writing, without truncation; create it if there is none.

    Raises:
        OSError: it cannot be opened, or it is a link, has a second name, or is no regular file; its
            ``strerror`` says so.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a symbolic link", str(path)) from None
        raise
    _check(descriptor, path, is_own=True)
    return os.fdopen(descriptor, "r+b")


def open_to_append(path: Path) -> io.BufferedWriter:
    """Open a file for appending, through links too; create it if there is none.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe or a device.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    _check(descriptor, path)
    return os.fdopen(descriptor, "ab")


def create_regular(path: Path) -> io.BufferedWriter:
    """Create a file for writing in place of what has its name, which is removed and not written to.

    Raises:
        OSError: it cannot be created.
    """
    path.unlink(missing_ok=True)
    return path.open("xb")


def _check(descriptor: int, path: Path, *, is_own: bool = False) -> None:
    """Close a file that is not regular, or that has a second name although it is our own."""
    try:
        status = os.fstat(descriptor)
        for is_kind, number, found in _KINDS:
            if is_kind(status.st_mode):
                raise OSError(number, found, str(path))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is a device, not a file", str(path))
        if is_own and status.st_nlink > 1:
            raise OSError(errno.EMLINK, "it has a second name, and another file would change", str(path))
    except BaseException:
        os.close(descriptor)
        raise
