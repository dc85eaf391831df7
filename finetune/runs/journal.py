"""Files that grow for hours, with a journal that says what they hold: a kill costs seconds.

::

    {"journal": 2, "facts": {...}}                             what the content is made from
    {"bytes": [7, 0], "sha256": ["...", "..."], "note": ...}   a block: its bytes in each file, and a note

A block counts once its line is whole. What a killed process wrote after its last block is cut off before the
next block is written. Every block is compared with its sha256 when the journal is opened, and the content
is used only if all of them are what they were. A journal of another format counts as none.

The process that has locked the journal for itself alone may write. Features and decoded images that are
kept between runs (:mod:`finetune.runs.block_file`) and the output of ``predict``
(:mod:`finetune.runs.resumable_writer`) are files of this kind.
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

FORMAT = 2
"""Of a journal; another one for every change of it."""


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        sizes: bytes in each file.
        digests: sha256 of these.
        note: of its writer, as plain JSON.
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
    """Of the journal's whole lines."""


def count_bytes(blocks: Sequence[Block], file: int = 0) -> int:
    """Return the bytes of all blocks in one of the files."""
    return sum(block.sizes[file] for block in blocks)


def as_json(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts as a journal gives them back: tuples are lists, keys are text."""
    return json.loads(json.dumps(dict(facts)))  # type: ignore[no-any-return]


def parse(content: bytes, num_files: int) -> Record | None:
    """Return what a journal says; None where it is damaged, of another format, or has no whole line."""
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
        raise ValueError("another number of files")
    if not all(isinstance(size, int) and size >= 0 for size in block.sizes):
        raise ValueError("sizes that are none")
    return block


def read_journal(path: Path, num_files: int) -> Record | None:
    """Return what the journal at a path says, without comparing the files; None as :func:`parse`."""
    try:
        return parse(path.read_bytes(), num_files)
    except OSError:
        return None


def read_facts(path: Path) -> dict[str, Any]:
    """Return what the files of a journal are made from; empty where that cannot be read."""
    try:
        with path.open("rb") as file:
            record = parse(file.readline(2**20), 0)
    except OSError:
        return {}
    return dict(record.facts) if record is not None else {}


class Journal:
    """The journal of files that grow together, created if there is none; close it to release its lock.

    Args:
        path: of the journal.
        files: in the order of :attr:`Block.sizes`.
        facts: what their content is made from, as JSON.
        durable: flush every block to the disk before it counts. Without, a power cut may damage what was
            written last, which the next opening notices.

    Attributes:
        blocks: those that count, in order; empty before :meth:`load`.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, path: Path, files: Sequence[Path], facts: Mapping[str, Any], *, durable: bool) -> None:
        self.path, self.blocks = path, list[Block]()
        self._files, self._facts, self._durable = tuple(files), as_json(facts), durable
        self._size = 0  # of the lines that count
        self._journal = _open(path)
        self._data: list[BinaryIO] = []

    # --- the lock --------------------------------------------------------------------------------

    def lock(self, how: int) -> bool:
        """Lock the journal (``fcntl.LOCK_EX`` to write, ``LOCK_SH`` to read); false where others hold it.

        Raises:
            OSError: the file system has no locks.
        """
        try:
            fcntl.flock(self._journal, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def was_removed(self) -> bool:
        """Return whether the path is another file by now, or none."""
        try:
            return not os.path.samestat(os.fstat(self._journal.fileno()), self.path.stat())
        except OSError:
            return True

    # --- reading ---------------------------------------------------------------------------------

    def load(self, verified: Callable[[int], None] = lambda _: None) -> bool:
        """Take the blocks that are there; none, and false, where something is not what it was.

        Args:
            verified: told of the bytes of every block that was compared.
        """
        self._journal.seek(0)
        content = self._journal.read()
        if b"\n" not in content:  # new, or killed with its first line
            return True
        record = parse(content, len(self._files))
        if record is None or record.facts != self._facts or not self._hold(record.blocks, verified):
            return False
        self.blocks, self._size = list(record.blocks), record.num_bytes
        return True

    def _hold(self, blocks: Sequence[Block], verified: Callable[[int], None]) -> bool:
        """Compare blocks with the files."""
        if not blocks:
            return True
        try:
            with ExitStack() as stack:
                files = [stack.enter_context(_open_to_read(path)) for path in self._files]
                for block in blocks:
                    for file, size, digest in zip(files, block.sizes, block.digests, strict=True):
                        if hashlib.sha256(file.read(size)).hexdigest() != digest:
                            return False
                    verified(block.num_bytes)
        except OSError:
            return False
        return True

    # --- writing, under an exclusive lock --------------------------------------------------------

    def begin(self) -> None:
        """Write what the content is made from, where that is not there yet.

        Raises:
            OSError: it cannot be written.
        """
        if not self._size:
            self._write_line({"journal": FORMAT, "facts": self._facts})
            if self._durable:
                sync_folder(self.path.parent)

    def restart(self) -> None:
        """Forget every block, and what the files hold.

        Raises:
            OSError: it cannot be written.
        """
        self.blocks, self._size = [], 0
        self.begin()
        self.close_files()
        self.open_files()

    def append(self, contents: Sequence[bytes], note: Any = None) -> None:
        """Add a block: some bytes to each file.

        Raises:
            OSError: it cannot be written, and nothing of it counts.
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
        """Open the files for writing, and cut off what came after the last block; at most once.

        Raises:
            OSError: one cannot be written, or is shorter than its blocks.
        """
        if self._data:
            return
        for number, path in enumerate(self._files):
            file, size = _open(path), count_bytes(self.blocks, number)
            self._data.append(file)
            if os.fstat(file.fileno()).st_size < size:
                raise OSError(errno.ESTALE, "the file was removed while it was written", str(path))
            file.truncate(size)
            file.seek(size)

    def _write_line(self, line: Mapping[str, Any]) -> None:
        content = json.dumps(line).encode() + b"\n"
        self._journal.seek(self._size)
        self._journal.truncate()  # a line that a kill has cut
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
            with suppress(OSError):  # tries once more to write what it could not, on a disk that may be full
                file.close()
        self._data = []

    def close(self) -> None:
        """Close files and journal, and release the lock."""
        self.close_files()
        with suppress(OSError):
            self._journal.close()


def _open_to_read(path: Path) -> BinaryIO:
    """Open a file; one that is not there counts as empty."""
    return path.open("rb") if path.exists() else io.BytesIO()


def _open(path: Path) -> BinaryIO:
    """Open for reading and writing, as it is; append mode would undo every ``seek``."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
