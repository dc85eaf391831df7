"""Files that grow for hours, with a journal of their content: after a kill, writing resumes.

::

    {"journal": 2, "facts": {...}}                             what the content is made from
    {"bytes": [7, 0], "sha256": ["...", "..."], "note": ...}   a block: its bytes in each file, and a note

A block is valid once its line is complete. What a killed process wrote after its last block is truncated
before the next block is written. Every block is compared with its sha256 when the journal is loaded, and the
content is used only if all of them match. A journal of another format is ignored.

Only a process with an exclusive lock on the journal may write. Cached features and decoded images
(:mod:`finetune.runs.block_file`) and the output of ``predict`` (:mod:`finetune.runs.resumable_writer`) are
files of this kind.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from finetune.runs.files import sync_folder
from finetune.system.regular_files import MOST_BYTES, open_regular, open_to_update, read_regular

FORMAT = 2
"""Version of the journal's format; every change of the format increases it."""


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        sizes: number of bytes in each file.
        digests: sha256 of the bytes in each file.
        note: value that the writer has stored with the block, as plain JSON.
    """

    sizes: tuple[int, ...]
    digests: tuple[str, ...]
    note: Any

    @property
    def num_bytes(self) -> int:
        """Bytes in all files together."""
        return sum(self.sizes)


@dataclass(frozen=True)
class Record:
    """The content of a journal: what the files are made from, and their blocks in order."""

    facts: Mapping[str, Any]
    blocks: tuple[Block, ...]
    num_bytes: int
    """Number of bytes of the journal's complete lines."""


def count_bytes(blocks: Sequence[Block], file: int = 0) -> int:
    """Return the number of bytes of all blocks in one of the files."""
    return sum(block.sizes[file] for block in blocks)


def as_json(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts as a journal returns them: tuples become lists, keys become text."""
    return json.loads(json.dumps(dict(facts)))  # type: ignore[no-any-return]


def parse(content: bytes, num_files: int) -> Record | None:
    """Return the content of a journal; None if it is damaged, of another format, or has no complete line."""
    lines = content.split(b"\n")
    torn = lines.pop()
    try:
        head, *rest = (json.loads(line) for line in lines)
        if head["journal"] != FORMAT or not isinstance(head["facts"], dict):
            return None
        blocks = tuple(_parse_block(line, num_files) for line in rest)
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return Record(head["facts"], blocks, len(content) - len(torn))


def _parse_block(line: Any, num_files: int) -> Block:
    block = Block(tuple(line["bytes"]), tuple(line["sha256"]), line["note"])
    if not len(block.sizes) == len(block.digests) == num_files:
        raise ValueError("wrong number of files")
    if not all(type(size) is int and size >= 0 for size in block.sizes):  # True is an int as well
        raise ValueError("invalid sizes")
    return block


def read_journal(path: Path, num_files: int) -> Record | None:
    """Return the content of the journal at a path, without verifying the files; None as :func:`parse`."""
    try:
        return parse(read_regular(path), num_files)
    except (OSError, MemoryError):
        return None


def read_facts(path: Path) -> dict[str, Any]:
    """Return what the files of a journal are made from; empty if that cannot be read."""
    try:
        with open_regular(path) as file:
            record = parse(file.readline(2**20), 0)
    except OSError:
        return {}
    return dict(record.facts) if record is not None else {}


class Journal:
    """The journal of files that grow together, created if there is none; close it to release its lock.

    Args:
        path: path of the journal.
        files: paths of the files, in the order of :attr:`Block.sizes`.
        facts: what the content is made from, as JSON.
        durable: whether to flush every block to the disk before it becomes valid. Otherwise a power cut may
            damage the last blocks, which :meth:`load` detects.

    Attributes:
        blocks: the valid blocks, in order; empty before :meth:`load`.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, path: Path, files: Sequence[Path], facts: Mapping[str, Any], *, durable: bool) -> None:
        self.path, self.blocks = path, list[Block]()
        self._files, self._facts, self._durable = tuple(files), as_json(facts), durable
        self._size = 0  # bytes of the complete lines
        self._journal = open_to_update(path)
        self._data: list[BinaryIO] = []

    # --- the lock --------------------------------------------------------------------------------

    def lock(self, how: int) -> bool:
        """Lock the journal (``fcntl.LOCK_EX`` to write, ``LOCK_SH`` to read); False if others hold it.

        Raises:
            OSError: the file system has no locks.
        """
        try:
            fcntl.flock(self._journal, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def was_removed(self) -> bool:
        """Return whether the file was removed or replaced since it was opened."""
        try:
            return not os.path.samestat(os.fstat(self._journal.fileno()), self.path.stat())
        except OSError:
            return True

    # --- reading ---------------------------------------------------------------------------------

    def load(self, on_verified: Callable[[int], None] = lambda _: None) -> bool:
        """Load and verify the blocks; load none and return False if facts or content differ.

        Args:
            on_verified: called with the number of bytes of every block that was verified.
        """
        if os.fstat(self._journal.fileno()).st_size > MOST_BYTES:
            return False
        self._journal.seek(0)
        content = self._journal.read()
        if b"\n" not in content:  # new, or its process was killed while it wrote the first line
            return True
        record = parse(content, len(self._files))
        if record is None or record.facts != self._facts or not self._verify(record.blocks, on_verified):
            return False
        self.blocks, self._size = list(record.blocks), record.num_bytes
        return True

    def _verify(self, blocks: Sequence[Block], on_verified: Callable[[int], None]) -> bool:
        """Return whether the content of the files matches the digests of the blocks."""
        if not blocks:
            return True
        try:
            with ExitStack() as stack:
                files = [stack.enter_context(_open_to_read(path)) for path in self._files]
                for number, file in enumerate(files):  # before a damaged size is allocated
                    if file.seek(0, os.SEEK_END) < count_bytes(blocks, number):
                        return False
                    file.seek(0)
                for block in blocks:
                    for file, size, digest in zip(files, block.sizes, block.digests, strict=True):
                        if hashlib.sha256(file.read(size)).hexdigest() != digest:
                            return False
                    on_verified(block.num_bytes)
        except (OSError, MemoryError):
            return False
        return True

    # --- writing, under an exclusive lock --------------------------------------------------------

    def begin(self) -> None:
        """Write the first line of a new journal: what the content is made from.

        Raises:
            OSError: the journal cannot be written.
        """
        if not self._size:
            self._write_line({"journal": FORMAT, "facts": self._facts})
            if self._durable:
                sync_folder(self.path.parent)

    def restart(self) -> None:
        """Remove every block and the content of the files.

        Raises:
            OSError: the journal or a file cannot be written.
        """
        self.blocks, self._size = [], 0
        self.begin()
        self.close_files()
        self.open_files()

    def append(self, contents: Sequence[bytes], note: Any = None) -> None:
        """Append a block: some bytes to each file.

        Raises:
            OSError: the block cannot be written; the earlier blocks stay valid.
        """
        self.begin()
        self.open_files()
        for file, content in zip(self._data, contents, strict=True):
            file.write(content)
            self._flush(file)
        sizes = [len(content) for content in contents]
        digests = [hashlib.sha256(content).hexdigest() for content in contents]
        self._write_line({"bytes": sizes, "sha256": digests, "note": note})
        self.blocks.append(Block(tuple(sizes), tuple(digests), note))

    def open_files(self) -> None:
        """Open the files for writing, truncated after the last block; does nothing if they are open.

        Raises:
            OSError: a file cannot be written, or is shorter than its blocks.
        """
        if self._data:
            return
        for number, path in enumerate(self._files):
            file, size = open_to_update(path), count_bytes(self.blocks, number)
            self._data.append(file)
            if os.fstat(file.fileno()).st_size < size:
                raise OSError(errno.ESTALE, "the file was removed while it was written", str(path))
            file.truncate(size)
            file.seek(size)

    def _write_line(self, line: Mapping[str, Any]) -> None:
        content = json.dumps(line).encode() + b"\n"
        self._journal.seek(self._size)
        self._journal.truncate()  # an incomplete line of a killed process
        self._journal.write(content)
        self._flush(self._journal)
        self._size += len(content)

    def _flush(self, file: BinaryIO) -> None:
        file.flush()
        if self._durable:
            os.fsync(file.fileno())

    def close_files(self) -> None:
        """Close the files; the journal stays locked."""
        for file in self._data:
            with suppress(OSError):  # close retries a failed write, on a disk that may be full
                file.close()
        self._data = []

    def close(self) -> None:
        """Close files and journal, and release the lock."""
        self.close_files()
        with suppress(OSError):
            self._journal.close()


def _open_to_read(path: Path) -> BinaryIO:
    """Open a file; a missing file counts as empty."""
    try:
        return open_regular(path)
    except FileNotFoundError:
        return io.BytesIO()
