"""A cached file of blocks: writing it can be resumed, and its content is verified by sha256.

::

    <name>.bin        the bytes, block after block
    <name>.journal    the facts it is made from, the sha256 of each block (:mod:`finetune.runs.journal`)

A killed process leaves whole blocks, and the next one appends to them. A file whose content has changed is
removed and made again, so nothing needs to be flushed to the disk.

Several processes may read a file. One at a time writes it, and the others wait for it, so that no work is
done twice.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from finetune.runs.journal import Block, Journal, count_bytes, read_facts
from finetune.system.regular_files import open_regular

WAIT_SECONDS = 0.2
"""Seconds between two checks whether another process has finished the file."""


class BlockFile:
    """The blocks of one file. It is locked until it is closed, so that no other process removes it.

    Args:
        path: path of the bytes, ending in ``.bin``.
        facts: what the content is made from; a file with other facts is removed.
        num_blocks: number of blocks of the complete file.
        on_wait: called repeatedly while another process writes the file; may raise.
        on_verified: called with the number of bytes of every block that was verified.
        fits: returns whether a block can be the one with this number, from 0; a file with any other block is
            damaged. The sha256 proves the bytes of a block, but neither their number nor the note.

    Attributes:
        was_damaged: whether existing content had changed and was removed.

    Raises:
        OSError: the folder cannot be written, or its file system has no locks.
    """

    def __init__(
        self,
        path: Path,
        facts: Mapping[str, Any],
        num_blocks: int,
        on_wait: Callable[[], None] = lambda: None,
        on_verified: Callable[[int], None] = lambda _: None,
        fits: Callable[[int, Block], bool] = lambda *_: True,
    ) -> None:
        self.path, self.num_blocks = path, num_blocks
        self.was_damaged = False
        self._facts, self._on_verified, self._fits = facts, on_verified, fits
        while not self._open():
            on_wait()
            time.sleep(WAIT_SECONDS)

    @property
    def blocks(self) -> list[Block]:
        """The blocks written so far, in order."""
        return self._journal.blocks

    @property
    def is_complete(self) -> bool:
        """Whether all blocks have been written."""
        return len(self.blocks) == self.num_blocks

    @property
    def num_bytes(self) -> int:
        """Number of bytes of the blocks written so far."""
        return count_bytes(self.blocks)

    def append(self, content: bytes, note: Any = None) -> None:
        """Append a block; after the last one other processes may read the file.

        Raises:
            OSError: the block cannot be written; the file stays as it was.
        """
        self._journal.append([content], note)
        if self.is_complete:
            self._journal.close_files()
            self._journal.lock(fcntl.LOCK_SH)

    def read(self) -> bytearray:
        """Return the bytes of all blocks written so far.

        Raises:
            OSError: the file cannot be read.
        """
        content = bytearray(self.num_bytes)
        if content:
            with open_regular(self.path) as file:
                file.readinto(content)
        return content

    def close(self) -> None:
        """Close the file and release its lock."""
        self._journal.close()

    def discard(self) -> None:
        """Remove the file and close it."""
        remove(self.path)
        self.close()

    def _open(self) -> bool:
        """Open and lock the journal; return False if it must be tried again."""
        path = journal_of(self.path)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._journal = Journal(path, [self.path], self._facts, durable=False)
        try:
            if self._take():
                return True
        except BaseException:
            self._journal.close()
            raise
        self._journal.close()
        return False

    def _take(self) -> bool:
        alone = self._journal.lock(fcntl.LOCK_EX)
        if not (alone or self._journal.lock(fcntl.LOCK_SH)) or self._journal.was_removed():
            return False
        if not (self._journal.load(self._on_verified) and self._all_fit()):
            # Processes that read the file keep their open file; a new one is started.
            self.was_damaged = True
            remove(self.path)
            if not self._journal.was_removed():  # in a folder of another user: it would be tried for ever
                raise OSError(errno.EACCES, "it is damaged and cannot be removed", str(self.path))
            return False
        if self.is_complete:
            self._journal.lock(fcntl.LOCK_SH)
            os.utime(self._journal.path)  # time of last use, for the removal of unused files
        elif alone:
            self._journal.begin()
        return self.is_complete or alone

    def _all_fit(self) -> bool:
        is_too_long = len(self.blocks) > self.num_blocks
        return not is_too_long and all(self._fits(number, block) for number, block in enumerate(self.blocks))


def journal_of(path: Path) -> Path:
    """Return the journal that belongs to a file of blocks."""
    return path.with_suffix(".journal")


def facts_of(path: Path) -> dict[str, Any]:
    """Return what a file of blocks is made from; empty if its journal cannot be read."""
    return read_facts(journal_of(path))


def remove(path: Path) -> None:
    """Remove a file of blocks: first the journal, then the bytes."""
    for file in (journal_of(path), path):
        with suppress(OSError):
            file.unlink(missing_ok=True)


def remove_unused(path: Path) -> bool:
    """Remove a file of blocks unless a process reads or writes it; return whether it is gone."""
    journal = journal_of(path)
    try:
        if os.path.lexists(journal) and not journal.is_file():  # a pipe or a device, which no process uses
            remove(path)
            return not os.path.lexists(journal)
        with open_regular(journal) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(path)  # under the lock, so that no process opens it in between
            return not os.path.lexists(journal)
    except OSError:
        return False


def is_in_use(path: Path) -> bool:
    """Return whether a process reads or writes a file of blocks."""
    try:
        with open_regular(journal_of(path)) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
