"""A file of blocks, written one after the other, that can be gone on with and proves its content.

::

    <name>.bin        the bytes, block after block
    <name>.journal    a line of JSON that says what they are, then one a block: bytes, sha256, note

A killed process leaves whole blocks and perhaps a piece of one, which is cut off; the next process goes on
after the last whole block. Every block is compared with its sha256 when the file is opened: what has changed
is thrown away and made again. So nothing needs to be flushed to the disk.

Several processes may read a file. One at a time writes it, and the others wait for it: the same work is not
done twice.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

WAIT_SECONDS = 0.2
"""Between two looks at whether another process has finished the file."""


@dataclass(frozen=True)
class Block:
    """One block: where it lies, and what its writer noted of it (plain JSON)."""

    offset: int
    num_bytes: int
    note: Any


class BlockFile:
    """Blocks of one file; close it to let others remove it.

    Args:
        path: of the bytes, ending in ``.bin``.
        facts: what the content is made from; a file that says otherwise is thrown away.
        num_blocks: of the whole file.
        waiting: called again and again while another process writes it; may raise.
        verified: told of the bytes of every block that was compared.

    Attributes:
        blocks: those that are there, in order.
        was_damaged: content that was there had changed, and is gone.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        path: Path,
        facts: Mapping[str, Any],
        num_blocks: int,
        waiting: Callable[[], None] = lambda: None,
        verified: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.path, self.num_blocks = path, num_blocks
        self.blocks: list[Block] = []
        self.was_damaged = False
        self._facts, self._verified = dict(facts), verified
        self._bytes: IO[bytes] | None = None
        while not self._open():
            waiting()
            time.sleep(WAIT_SECONDS)

    @property
    def is_complete(self) -> bool:
        """Whether all blocks are there."""
        return len(self.blocks) >= self.num_blocks

    @property
    def num_bytes(self) -> int:
        """Of the blocks that are there."""
        return self.blocks[-1].offset + self.blocks[-1].num_bytes if self.blocks else 0

    def append(self, content: bytes, note: Any = None) -> None:
        """Add a block; the last one lets other processes read.

        Raises:
            OSError: it cannot be written, and nothing of it counts.
        """
        if self._bytes is None:
            self._bytes = self.path.open("r+b" if self.path.exists() else "w+b")
            if os.fstat(self._bytes.fileno()).st_size < self.num_bytes:
                raise OSError(errno.ESTALE, "the file was removed while it was written", str(self.path))
            self._bytes.truncate(self.num_bytes)
            self._bytes.seek(0, os.SEEK_END)
        self._bytes.write(content)
        self._bytes.flush()
        line = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "note": note}
        self._write_line(line)
        self.blocks.append(Block(self.num_bytes, len(content), note))
        if self.is_complete:
            self._bytes.close()
            self._lock(fcntl.LOCK_SH)

    def read(self) -> bytearray:
        """Return the bytes of all blocks that are there.

        Raises:
            OSError: the file cannot be read.
        """
        content = bytearray(self.num_bytes)
        if content:
            with self.path.open("rb") as file:
                file.readinto(content)
        return content

    def close(self) -> None:
        """Let go of the file."""
        with suppress(OSError):  # what could not be written is tried once more, on a disk that may be full
            if self._bytes is not None:
                self._bytes.close()
        with suppress(OSError):
            self._journal.close()

    def discard(self) -> None:
        """Remove the file, and let go of it."""
        remove(self.path)
        self.close()

    # --- opening ---------------------------------------------------------------------------------

    def _open(self) -> bool:
        """Open the journal under a lock; false when that must be tried again."""
        self.blocks.clear()
        path = journal_of(self.path)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._journal = os.fdopen(descriptor, "r+b")
        alone = self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not alone and not self._lock(fcntl.LOCK_SH | fcntl.LOCK_NB):
            self._journal.close()
            return False
        if not self._was_removed(path):
            if not self._read():
                # Others may read it: they keep what they have open, and a new file begins.
                self.was_damaged = True
                remove(self.path)
            elif self.is_complete:
                self._lock(fcntl.LOCK_SH)
                os.utime(path)  # for whoever looks for what was not used for long
                return True
            elif alone:
                return True
        self._journal.close()
        return False

    def _lock(self, how: int) -> bool:
        """Lock the journal; where the file system has no locks, nothing can be kept there."""
        try:
            fcntl.flock(self._journal, how)
        except BlockingIOError:
            return False
        return True

    def _was_removed(self, path: Path) -> bool:
        try:
            return not os.path.samestat(os.fstat(self._journal.fileno()), path.stat())
        except OSError:
            return True

    def _read(self) -> bool:
        """Take every block that the journal tells of; false when one is not what it was."""
        lines = self._journal.read().split(b"\n")
        torn = lines.pop()
        if not lines and not torn:
            self._write_line(self._facts)
            return True
        try:
            head, *rest = (json.loads(line) for line in lines)
        except ValueError:
            return False
        if head != json.loads(json.dumps(self._facts)) or not self._take(rest):
            return False
        self._journal.seek(-len(torn), os.SEEK_END)
        self._journal.truncate()
        return True

    def _take(self, lines: list[Any]) -> bool:
        offset = 0
        try:
            with self.path.open("rb") if lines else open(os.devnull, "rb") as file:  # noqa: PTH123
                for line in lines:
                    content = file.read(line["bytes"])
                    if hashlib.sha256(content).hexdigest() != line["sha256"]:
                        return False
                    self.blocks.append(Block(offset, len(content), line["note"]))
                    offset += len(content)
                    self._verified(len(content))
        except (OSError, LookupError, TypeError):
            return False
        return True

    def _write_line(self, line: Mapping[str, Any]) -> None:
        self._journal.seek(0, os.SEEK_END)
        self._journal.write(json.dumps(line).encode() + b"\n")
        self._journal.flush()


def journal_of(path: Path) -> Path:
    """Return the journal that belongs to a file of blocks."""
    return path.with_suffix(".journal")


def read_facts(path: Path) -> dict[str, Any]:
    """Return what a file of blocks says it is made from; empty where that cannot be read."""
    try:
        with journal_of(path).open("rb") as file:
            facts = json.loads(file.readline(2**20))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def remove(path: Path) -> None:
    """Remove a file of blocks: the bytes last, without which a journal is worth nothing."""
    for file in (journal_of(path), path):
        with suppress(OSError):
            file.unlink(missing_ok=True)


def remove_unused(path: Path) -> bool:
    """Remove a file of blocks that no process reads or writes; return whether it is gone."""
    try:
        with journal_of(path).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(path)  # under the lock: nobody begins with it in between
            return not journal_of(path).exists()
    except OSError:
        return False


def is_in_use(path: Path) -> bool:
    """Return whether a process reads or writes a file of blocks."""
    try:
        with journal_of(path).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
