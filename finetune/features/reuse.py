"""Rows of single images in other files of the cache, found by the sha256 of each image.

The file of a set of images is of no use to a set with one image more, but its rows are: where batches have a
fixed size, a row does not depend on the other images of its batch. So whoever adds images to a data set, or
takes some away, computes the rows of new images only.

Shape legend: B images of a block, D features of one place in the network.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from finetune.runs.block_file import journal_of
from finetune.runs.cache_dir import CachedFile
from finetune.runs.journal import Block, as_json, read_journal
from finetune.system.regular_files import open_regular

IMAGES, LOST = "images", "lost"
"""Keys of a block's note: the sha256 of its images in order, and why some of them have no row, by index."""
_OF_THE_SET = frozenset({"num_images", "images"})
"""Facts of a file that depend on its set of images."""


RowBlock = tuple[list[Tensor], dict[int, str]]
"""Rows (B, D) of a block in each place, and why some of its images are lost, by their index."""


class KnownRow(NamedTuple):
    """Where the row of an image is: an open file, an offset in bytes, and a number of bytes."""

    file: BinaryIO
    offset: int
    num_bytes: int

    def read(self) -> bytes:
        """Return the bytes of the row.

        Raises:
            OSError: the file was cut short.
        """
        content = os.pread(self.file.fileno(), self.num_bytes, self.offset)
        if len(content) != self.num_bytes:
            raise OSError(f"{self.file.name} was cut short")
        return content


def find_known_rows(
    files: Sequence[CachedFile],
    facts: Mapping[str, Any],
    wanted: Collection[str],
    row_bytes: int,
    stack: ExitStack,
    tell: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, KnownRow]:
    """Return the rows of images in files that may differ from a wanted one in their set of images, by sha256.

    Every block is compared with its sha256. A file may be removed meanwhile: it stays open.

    Args:
        files: cached files; of several with an image, the first one counts.
        facts: what the wanted file is made from.
        wanted: sha256 of the images.
        row_bytes: size in bytes of a row.
        stack: closes the files.
        tell: called after each file with the images found and all that are wanted.
    """
    left, found = set(wanted), dict[str, KnownRow]()
    family = _family_of(facts)
    for cached in files:
        if not left:
            break
        if _family_of(cached.facts) == family:
            for image, row in _read_file(cached.path, left, row_bytes, stack):
                found[image] = row
                left.discard(image)
        tell(len(found), len(wanted))
    return found


def _family_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    return as_json({key: value for key, value in facts.items() if key not in _OF_THE_SET})


def _read_file(
    path: Path, wanted: Collection[str], row_bytes: int, stack: ExitStack
) -> Iterator[tuple[str, KnownRow]]:
    record = read_journal(journal_of(path), 1)
    if record is None or not any(wanted & _images_of(block).keys() for block in record.blocks):
        return
    try:
        file = stack.enter_context(open_regular(path))
    except OSError:  # removed meanwhile
        return
    start = 0
    for block in record.blocks:
        places = _images_of(block)
        held = [image for image in places if image in wanted]
        if held and block.num_bytes == len(block.note[IMAGES]) * row_bytes and _is_intact(file, start, block):
            yield from (
                (image, KnownRow(file, start + places[image] * row_bytes, row_bytes)) for image in held
            )
        start += block.num_bytes


def _images_of(block: Block) -> dict[str, int]:
    """Return the place of each image of a block that has a row, by sha256; empty where none are named."""
    note = block.note
    if not (isinstance(note, dict) and isinstance(note.get(IMAGES), list) and not note.get(LOST)):
        return {}
    return {image: place for place, image in enumerate(note[IMAGES]) if isinstance(image, str)}


def _is_intact(file: BinaryIO, start: int, block: Block) -> bool:
    content = os.pread(file.fileno(), block.num_bytes, start)
    return hashlib.sha256(content).hexdigest() == block.digests[0]


def join_rows(
    computed: Iterable[RowBlock],
    known: Sequence[Mapping[str, KnownRow]],
    images: Sequence[str],
    done: int,
    batch_size: int,
    dtype: torch.dtype,
) -> Iterator[RowBlock]:
    """Yield blocks of rows: known ones, and those that are computed for all other images in their order.

    Args:
        computed: rows of the images that are not known in every place, in batches; an index is a place there.
        known: the known rows of each place, by sha256.
        images: sha256 of all images.
        done: number of blocks that are there already.
        batch_size: images of a block, B.
        dtype: type of the rows.
    """
    rows_of_new = _split(computed)
    for start in range(done * batch_size, len(images), batch_size):
        parts: list[list[Tensor]] = []
        lost: dict[int, str] = {}
        for index, image in enumerate(images[start : start + batch_size], start):
            if all(image in rows for rows in known):
                found = [_read(rows[image], dtype) for rows in known]
            else:
                found, reason = next(rows_of_new)
                lost |= {index: reason} if reason is not None else {}
            parts.append(found)
        yield [torch.stack(rows) for rows in zip(*parts, strict=True)], lost


def _read(row: KnownRow, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(row.read()), dtype=dtype)


def _split(computed: Iterable[RowBlock]) -> Iterator[tuple[list[Tensor], str | None]]:
    """Yield the row of each image in every place, and why it is lost."""
    start = 0
    for rows, lost in computed:
        for index, parts in enumerate(zip(*rows, strict=True), start):
            yield list(parts), lost.get(index)
        start += len(rows[0])
