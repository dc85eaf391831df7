"""Open files that others may have prepared.

Only regular files are opened, so that a pipe never blocks and no device fills the memory. Files are never
written through a link, so that no other file is overwritten.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, TypeVar

T = TypeVar("T")

_KINDS = (
    (stat.S_ISDIR, errno.EISDIR, "it is a folder"),
    (stat.S_ISFIFO, errno.EINVAL, "it is a named pipe, not a file"),
)
MOST_BYTES = 2**30
"""Largest file of ours that is read as a whole. A sparse file takes no room on the disk, but all memory."""
_LONGEST_LINE = 2**26
"""Characters. The header of a table with 200,000 classes has fewer."""


def open_regular(path: Path) -> io.BufferedReader:
    """Open a file for reading, through links too.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe or a device; its ``strerror`` says so. Reading
            raises it for a stream of the kernel that looks like a file (``/proc/kmsg``).
    """
    # O_NONBLOCK, since opening a pipe would wait for its other end. It changes nothing for a file on a disk.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:  # a null character, or one that has no bytes: a table may name such a file
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None
    _check(descriptor, path)
    return io.BufferedReader(_WholeFile(descriptor, path))


def open_text(path: Path, most_bytes: int | None = None) -> TextIO:
    """Open a file of UTF-8 text for reading, as :func:`open_regular` does; its line ends stay as they are.

    Args:
        path: path of the file.
        most_bytes: largest size of the file; None for any.

    Raises:
        OSError: as :func:`open_regular`, or it is larger.
    """
    file = open_regular(path)
    if most_bytes is not None:
        check_size(file, path, most_bytes)
    return io.TextIOWrapper(file, encoding="utf-8", newline="")


def read_regular(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """Return the content of a file of at most ``most_bytes``.

    Raises:
        OSError: as :func:`open_regular`, or it is larger.
    """
    with open_regular(path) as file:
        check_size(file, path, most_bytes)
        return file.read()


def hash_regular(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal.

    Raises:
        OSError: as :func:`open_regular`.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_size(file: io.BufferedReader | io.BufferedRandom, path: Path, most_bytes: int = MOST_BYTES) -> None:
    """Close a file that is larger than ``most_bytes``, before it is read into memory.

    Raises:
        OSError: it is larger.
    """
    if (size := os.fstat(file.fileno()).st_size) > most_bytes:
        file.close()
        raise OSError(errno.EINVAL, f"it has {size:,} bytes, more than {most_bytes:,}", str(path))


def bounded_lines(file: TextIO) -> Iterator[str]:
    """Yield the lines of a file; one that no table of ours has is refused before it is held in memory.

    Raises:
        ValueError: a line is too long.
    """
    while line := file.readline(_LONGEST_LINE):
        if len(line) == _LONGEST_LINE:
            raise ValueError(f"a line has more than {_LONGEST_LINE:,} characters")
        yield line


def open_to_update(path: Path) -> io.BufferedRandom:
    """Open a file of our own for reading and writing, without truncation; create it if there is none.

    Raises:
        OSError: it cannot be opened, or it is a link, has a second name, or is no regular file; its
            ``strerror`` says so.
    """
    return os.fdopen(open_own(path, 0o666), "r+b")


def open_own(path: Path, mode: int) -> int:
    """Open a file as :func:`open_to_update` does, with the rights of a new one; return its descriptor."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a symbolic link", str(path)) from None
        raise
    _check(descriptor, path, is_own=True)
    return descriptor


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


class _WholeFile(io.FileIO):
    """A file whose end is its last byte: one that has no bytes now and may have some later is refused.

    Some streams of the kernel count as regular files. Reading them gives None, since they were opened without
    waiting, and callers would take that for bytes.
    """

    def __init__(self, descriptor: int, path: Path) -> None:
        super().__init__(descriptor, "rb")
        self._path = path

    def readinto(self, buffer: Any, /) -> int:
        """Read the next bytes; 0 at the end."""
        size: int | None = super().readinto(buffer)
        return self._ended(size)

    def readall(self) -> bytes:
        """Read up to the end."""
        return self._ended(super().readall())

    def _ended(self, found: T | None) -> T:
        if found is None:
            raise OSError(errno.EINVAL, "it is a stream, not a file", str(self._path))
        return found


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
