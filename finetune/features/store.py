"""Cached features: the rows of a network for each image and view, computed once and kept on disk.

A resumed run uses them, and so does the next run on the same images, whatever its head, learning rate, seed
or number of epochs. The file name is a digest of what the rows depend on: weights, place in the network,
views, images and their order, versions and hardware. One forward pass computes the rows of several places.

Where a row depends on nothing but its image, the rows of images that other files hold are copied from these
(:mod:`finetune.features.reuse`): a set with new images computes the rows of these alone, with the same bits.

Shape legend: N images, B batch, D features of one place in the network.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.data.dataset import Sample
from finetune.data.loader import Batch, ImageLoader
from finetune.errors import DataError
from finetune.features.reuse import IMAGES, LOST, KnownRow, RowBlock, find_known_rows, join_rows
from finetune.features.rows import FileRows, MemoryRows, Rows
from finetune.runs.block_file import BlockFile, remove_unused
from finetune.runs.cache_dir import FeatureCacheDir, wait_for_writer
from finetune.runs.journal import Block
from finetune.system.device import DTYPES, Precision, compute_chunk_size
from finetune.system.display import Display
from finetune.system.distributed import SINGLE_PROCESS, Distributed
from finetune.system.forward import ChunkedForward, autocast

FORMAT = 2
GPU_BATCH = 128
"""Number of images in a forward pass on a GPU."""
MEMORY_BYTES = 2**26
"""Largest size in bytes of rows that are kept in memory; larger ones are read from their file."""

Forward = Callable[[Tensor], Tensor]
"""Takes images (B, 3, H, W) and returns their rows (B, D + D' + ...), concatenated over places."""


def compute_batch_size(device: torch.device, input_size: tuple[int, int, int]) -> int:
    """Return the number of images of a forward pass.

    It depends on device and input size only, not on the recipe's batch size, since the last bits of features
    depend on it. (If a GPU still runs out of memory, batches are split.)
    """
    return GPU_BATCH if device.type == "cuda" else compute_chunk_size(*input_size[1:])


def row_bytes(numel: int, precision: Precision) -> int:
    """Return the size in bytes of one image's row."""
    return numel * DTYPES[precision].itemsize


@dataclass(frozen=True)
class RowSpec:
    """A place in a network whose output is cached, and what its rows depend on.

    Attributes:
        facts: everything that the rows depend on; ``kind`` begins the file name, ``num_images`` is N.
        numel: number of features of an image, D.
        images: sha256 of each image in order, if its row depends on its content and on no other image; else
            empty.
    """

    facts: Mapping[str, Any]
    numel: int
    images: tuple[str, ...] = ()

    @property
    def num_images(self) -> int:
        """Number of images, N."""
        return int(self.facts["num_images"])


def describe_images(digests: Sequence[str]) -> dict[str, Any]:
    """Return the number of images, and a digest of their sha256 in order."""
    images = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return {"num_images": len(digests), "images": images}


@dataclass
class _Store:
    """The file and the memory that the rows of one place are written to."""

    place: RowSpec
    file: BlockFile | None
    memory: Tensor | None
    known: Mapping[str, KnownRow] = field(default_factory=dict)  # rows in other files

    @property
    def num_done(self) -> int:
        """Number of blocks in the file."""
        return len(self.file.blocks) if self.file is not None else 0

    @property
    def content(self) -> Tensor | Path:
        """The rows (N, D), or the file that holds them."""
        if self.memory is not None:
            return self.memory
        assert self.file is not None
        return self.file.path


@dataclass
class KeptRows:
    """Rows of images, from cached files or computed by a network.

    Attributes:
        cache_dir: the folder of the files.
        device: the device of the network.
        batch_size: images a forward pass.
        precision: the precision of the forward pass.
        dtype: the type of the rows.
        display: shows progress.
        check_unchanged: raises if images changed since their digests were taken.
        num_computed: images that went through the network.
        num_found: rows of the first place that were cached, in its file or another one.
        lost: why each image could not be decoded, by index; its rows are NaN.
        distributed: processes of this machine. They compute missing batches in turns; the main process
            writes them, and all get the same rows.
    """

    cache_dir: FeatureCacheDir
    device: torch.device
    batch_size: int
    precision: Precision
    dtype: Precision
    display: Display
    check_unchanged: Callable[[Sequence[Sample]], None] = lambda _: None
    num_computed: int = 0
    num_found: int = 0
    lost: dict[int, str] = field(default_factory=dict)
    distributed: Distributed = SINGLE_PROCESS
    _files: list[BlockFile] = field(default_factory=list)
    _fault: OSError | None = None  # of the disk
    _num_bytes: int = 0  # held in memory

    def rows(
        self,
        places: Sequence[RowSpec],
        open_forward: Callable[[tuple[int, ...]], Forward],
        open_loader: Callable[[tuple[int, ...] | None], ImageLoader],
        epoch: int,
        title: str,
    ) -> list[Rows]:
        """Return the rows (N, D) of each place: cached ones, and the rest computed by the network.

        Args:
            places: places in the network, over the same images.
            open_forward: returns the forward function of some of the places, by their index.
            open_loader: returns an unshuffled loader with batches of :attr:`batch_size`, of the images with
                these numbers (None: of all); called only if rows must be computed.
            epoch: the epoch of the loader's views.
            title: the title of the progress bar.

        Raises:
            DataError: an image can no longer be read.
            OSError: a file cannot be written, and the rows do not fit in memory.
        """
        stores, fault = [_Store(place, None, None) for place in places], None
        with ExitStack() as stack:
            missing, done, new = self.distributed.share(lambda: self._find_missing(stores, stack))
            some = [stores[number] for number in missing]
            try:
                if missing:
                    self._compute(
                        open_loader, some, partial(open_forward, tuple(missing)), done, new, epoch, title
                    )
            except (DataError, OSError) as error:
                fault = error
        return self._hand_round(stores, fault)

    def _find_missing(
        self, stores: Sequence[_Store], stack: ExitStack
    ) -> tuple[list[int], int, list[int] | None]:
        """Open the files; return the incomplete places, the blocks that all of them have, and new images.

        These are the images after those blocks whose rows no other file holds; None if none holds any.
        """
        for store in stores:
            self._open(store)
        missing = [
            number for number, store in enumerate(stores) if store.num_done < self._num_blocks(store.place)
        ]
        done = min((stores[number].num_done for number in missing), default=0)
        place = stores[0].place
        self.num_found += min(self.batch_size * stores[0].num_done, place.num_images)
        if not missing or not place.images:
            return missing, done, None
        start = done * self.batch_size
        files, wanted = self.cache_dir.list()[::-1], place.images[start:]  # the last used first
        with self.display.count("looking for kept features") as tell:
            for store in (stores[number] for number in missing):
                num_bytes = row_bytes(store.place.numel, self.dtype)
                store.known = find_known_rows(files, store.place.facts, wanted, num_bytes, stack, tell)
        known = set.intersection(*(set(stores[number].known) for number in missing))
        new = [image for image in range(start, place.num_images) if place.images[image] not in known]
        return missing, done, new if known else None

    def _hand_round(self, stores: Sequence[_Store], fault: Exception | None) -> list[Rows]:
        """Return the rows in every process, or raise the error in all of them."""

        def make() -> tuple[list[Tensor | Path], dict[int, str]]:
            if fault is not None:
                raise fault
            return [store.content for store in stores], self.lost

        contents, self.lost = self.distributed.share(make)
        return [
            MemoryRows(content)
            if isinstance(content, Tensor)
            else FileRows(content, (store.place.num_images, store.place.numel), DTYPES[self.dtype])
            for store, content in zip(stores, contents, strict=True)
        ]

    def close(self) -> None:
        """Close the files; other processes may then remove them."""
        for file in self._files:
            file.close()

    def discard(self) -> None:
        """Remove the files, which are no longer needed."""
        for file in self._files:
            file.discard()

    # --- files -----------------------------------------------------------------------------------

    def _num_blocks(self, place: RowSpec) -> int:
        return math.ceil(place.num_images / self.batch_size)

    def _open(self, store: _Store) -> None:
        place = store.place
        num_bytes = place.num_images * row_bytes(place.numel, self.dtype)
        if self._num_bytes + num_bytes <= MEMORY_BYTES:
            store.memory = torch.empty(place.num_images, place.numel, dtype=DTYPES[self.dtype])
            self._num_bytes += num_bytes
        store.file = self._open_file(place, num_bytes, store.memory is not None)
        if store.file is not None and store.file.blocks:
            self._read(store.file, store.memory)

    def _open_file(self, place: RowSpec, num_bytes: int, fits_memory: bool) -> BlockFile | None:
        path = self.cache_dir.path_for(place.facts)
        if self._fault is not None:
            if not fits_memory:
                raise self._fault
            return None
        try:
            with self.display.track("comparing kept features", num_bytes) as advance:
                file = BlockFile(
                    path,
                    place.facts,
                    self._num_blocks(place),
                    on_wait=wait_for_writer(path, "another run computes the same features", self.display),
                    on_verified=lambda done: advance(done, ""),
                    fits=partial(self._fits, place),
                )
            self._files.append(file)
            if file.was_damaged:
                self.display.warn(f"{path} had changed since it was written; it is computed again")
            if not file.is_complete:
                self.cache_dir.make_room(num_bytes - file.num_bytes)
        except OSError as error:
            remove_unused(path)  # a pipe in its place, or on a full disk an incomplete file
            self._give_up_disk(error, fits_memory)
            return None
        return file

    def _fits(self, place: RowSpec, number: int, block: Block) -> bool:
        """Return whether a block holds the rows of its images, and reasons for some of these."""
        start = number * self.batch_size
        images = range(start, min(start + self.batch_size, place.num_images))
        note = block.note or {}
        lost = note.get(LOST, {}) if isinstance(note, dict) else None
        return (
            block.num_bytes == len(images) * row_bytes(place.numel, self.dtype)
            and isinstance(lost, dict)
            and lost.keys() <= set(map(str, images))
            and all(isinstance(reason, str) for reason in lost.values())
            and note.get(IMAGES, []) == list(place.images[start : images.stop])
        )

    def _give_up_disk(self, error: OSError, fits_memory: bool) -> None:
        if not fits_memory:
            raise error
        self._fault = error
        where = error.filename or self.cache_dir.folder
        self.display.warn(f"features cannot be cached for the next run ({where}: {error.strerror or error})")

    def _read(self, file: BlockFile, memory: Tensor | None) -> None:
        for block in file.blocks:
            self.lost |= {int(index): reason for index, reason in (block.note or {}).get(LOST, {}).items()}
        if memory is not None:
            found = torch.frombuffer(file.read(), dtype=DTYPES[self.dtype]).view(-1, memory.shape[1])
            memory[: len(found)] = found

    # --- computing -------------------------------------------------------------------------------

    def _compute(
        self,
        open_loader: Callable[[tuple[int, ...] | None], ImageLoader],
        stores: list[_Store],
        open_forward: Callable[[], Forward],
        done: int,
        new: list[int] | None,
        epoch: int,
        title: str,
    ) -> None:
        """Compute the missing rows, or copy them where other files hold them."""
        total, images = stores[0].place.num_images, stores[0].place.images
        computed = range(total) if new is None else frozenset(new)
        with (
            self.display.track(title, total) as advance,
            torch.inference_mode(),
            autocast(self.device, self.precision),
        ):
            advance(done * self.batch_size, "")
            own: Iterator[RowBlock] = iter(())
            if new is None:
                own = self._run_all(open_loader(None), open_forward(), stores, done, epoch)
            elif new:
                own = self._run_all(open_loader(tuple(new)), open_forward(), stores, 0, epoch)
            blocks = self.distributed.merge(own)
            if new is not None and self.distributed.is_main:
                left = total - done * self.batch_size - len(new)
                self.display.say(f"{title}: {left:,} of {total:,} images are kept from other commands")
                known = [store.known for store in stores]
                blocks = join_rows(blocks, known, images, done, self.batch_size, DTYPES[self.dtype])
            for number, (rows, lost) in enumerate(blocks, done):
                self.lost |= lost
                for store, some in zip(stores, rows, strict=True):
                    self._store(store, number, some, lost)
                start = number * self.batch_size
                num_new = sum(image in computed for image in range(start, start + len(rows[0])))
                self.num_computed += num_new
                self.num_found += len(rows[0]) - num_new
                advance(len(rows[0]), "")

    def _run_all(
        self, loader: ImageLoader, forward: Forward, stores: Sequence[_Store], done: int, epoch: int
    ) -> Iterator[RowBlock]:
        """Yield the rows of each place and the lost images, for every batch of this process."""
        chunked, widths = ChunkedForward(forward), [store.place.numel for store in stores]
        batches = loader.batches(epoch, start=done)
        for number, batch in enumerate(batches):
            start = (done + self.distributed.rank + number * self.distributed.size) * self.batch_size
            samples = loader.samples[start : start + self.batch_size]
            self.check_unchanged(samples)
            rows = self._run(chunked, batch, start, len(samples), widths, bool(stores[0].place.images))
            yield rows, _find_lost(samples, start, batch.lost)

    def _run(
        self, forward: ChunkedForward, batch: Batch, start: int, size: int, widths: list[int], is_alone: bool
    ) -> list[Tensor]:
        """Return rows (size, D) of each place, NaN in those of lost images."""
        dtype, number, images = DTYPES[self.dtype], len(batch.indices), batch.images
        if is_alone and 0 < number < self.batch_size:
            # The last bits depend on the size of a batch, but not on what is in it.
            images = nn.functional.pad(images, (0, 0) * (images.ndim - 1) + (0, self.batch_size - number))
        if number == size:
            rows = forward(images)[:number].to("cpu", dtype)
        else:
            rows = torch.full((size, sum(widths)), math.nan, dtype=dtype)
        if 0 < number < size:
            rows[batch.indices - start] = forward(images)[:number].to("cpu", dtype)
        return [part.contiguous() for part in torch.split(rows, widths, dim=1)]

    def _store(self, store: _Store, number: int, rows: Tensor, lost: Mapping[int, str]) -> None:
        """Write a block of rows to memory and to the file, unless the file already has it."""
        start = number * self.batch_size
        if store.memory is not None:
            store.memory[start : start + len(rows)] = rows
        if store.file is None or number < store.num_done:
            return
        images = store.place.images[start : start + len(rows)]
        note = ({IMAGES: list(images)} if images else {}) | ({LOST: dict(lost)} if lost else {})
        try:
            store.file.append(rows.view(torch.uint8).numpy().tobytes(), note or None)
        except OSError as error:
            self._files.remove(store.file)
            store.file.discard()  # on a full disk, an incomplete file is useless
            store.file = None
            self._give_up_disk(error, store.memory is not None)


def _find_lost(samples: Sequence[Sample], start: int, lost: Mapping[str, str]) -> dict[int, str]:
    """Return reasons by index, not by path: rows are cached by content, wherever the images lie."""
    return {start + place: lost[one.path] for place, one in enumerate(samples) if one.path in lost}
