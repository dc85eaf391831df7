"""A file of blocks that is kept between runs: it can be gone on with, and proves its content.

::

    <name>.bin        the bytes, block after block
    <name>.journal    what they are, and the sha256 of each block (:mod:`finetune.runs.journal`)

A killed process leaves whole blocks, and the next one goes on after them. A file whose content has changed is
thrown away and made again; so nothing needs to be flushed to the disk.

Several processes may read a file. One at a time writes it, and the others wait for it: the same work is not
done twice.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from finetune.runs.journal import Block, Journal, count_bytes, read_facts

WAIT_SECONDS = 0.2
"""Between two looks at whether another process has finished the file."""


class BlockFile:
    """Blocks of one file; close it to let others remove it.

    Args:
        path: of the bytes, ending in ``.bin``.
        facts: what the content is made from; a file that says otherwise is thrown away.
        num_blocks: of the whole file.
        waiting: called again and again while another process writes it; may raise.
        verified: told of the bytes of every block that was compared.

    Attributes:
        was_damaged: content that was there had changed, and is gone.

    Raises:
        OSError: the folder cannot be written, or its file system has no locks.
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
        self.was_damaged = False
        self._facts, self._verified = facts, verified
        while not self._open():
            waiting()
            time.sleep(WAIT_SECONDS)

    @property
    def blocks(self) -> list[Block]:
        """Those that are there, in order."""
        return self._journal.blocks

    @property
    def is_complete(self) -> bool:
        """Whether all blocks are there."""
        return len(self.blocks) >= self.num_blocks

    @property
    def num_bytes(self) -> int:
        """Of the blocks that are there."""
        return count_bytes(self.blocks)

    def append(self, content: bytes, note: Any = None) -> None:
        """Add a block; the last one lets other processes read.

        Raises:
            OSError: it cannot be written, and nothing of it counts.
        """
        self._journal.append([content], note)
        if self.is_complete:
            self._journal.close_files()
            self._journal.lock(fcntl.LOCK_SH)

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
        self._journal.close()

    def discard(self) -> None:
        """Remove the file, and let go of it."""
        remove(self.path)
        self.close()

    def _open(self) -> bool:
        """Open the journal under a lock; false when that must be tried again."""
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
        if not self._journal.load(self._verified):
            # Others may read it: they keep what they have open, and a new file begins.
            self.was_damaged = True
            remove(self.path)
            return False
        if self.is_complete:
            self._journal.lock(fcntl.LOCK_SH)
            os.utime(self._journal.path)  # for whoever looks for what was not used for long
        elif alone:
            self._journal.begin()
        return self.is_complete or alone


def journal_of(path: Path) -> Path:
    """Return the journal that belongs to a file of blocks."""
    return path.with_suffix(".journal")


def facts_of(path: Path) -> dict[str, Any]:
    """Return what a file of blocks says it is made from; empty where that cannot be read."""
    return read_facts(journal_of(path))


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
