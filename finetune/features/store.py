"""What a network makes of each image and view: computed once, and kept.

Kept on disk, for this run when it goes on and for the next one on the same images, whatever its head,
rate, seed or number of epochs. What the rows depend on is in the file's name: weights, place in the network,
views, images and their order, versions and hardware. Rows of several places come from one pass.

Shape legend: N images, B batch, D numbers of one place for one image.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.data.dataset import Sample
from finetune.data.loader import Batch, ImageLoader
from finetune.errors import DataError
from finetune.features.rows import FileRows, MemoryRows, Rows
from finetune.runs.block_file import BlockFile
from finetune.runs.cache_dir import FeatureCacheDir, wait_for_writer
from finetune.system.device import DTYPES, Precision, compute_chunk_size
from finetune.system.display import Display
from finetune.system.distributed import SINGLE_PROCESS, Distributed
from finetune.system.forward import ChunkedForward, autocast

FORMAT = 1
GPU_BATCH = 128
"""Images that go through a network at a time on a GPU."""
MEMORY_BYTES = 2**26
"""Rows of a run that are held in memory; more stay in their files and are read as they are needed."""

Forward = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) to rows (B, D + D' + ...) of several places, side by side."""


def compute_batch_size(device: torch.device, input_size: tuple[int, int, int]) -> int:
    """Return how many images go through a network at a time.

    Nothing but device and size decides, whatever the recipe's batch size is: last bits depend on it. (Only
    where a GPU's memory runs out even so, smaller parts go through.)
    """
    return GPU_BATCH if device.type == "cuda" else compute_chunk_size(*input_size[1:])


def row_bytes(numel: int, precision: Precision) -> int:
    """Return the bytes of one image's row."""
    return numel * DTYPES[precision].itemsize


@dataclass(frozen=True)
class RowSpec:
    """A place in a network that gives rows, and what they depend on.

    Attributes:
        facts: everything that they depend on; ``kind`` begins the file's name, ``num_images`` counts them.
        numel: D.
    """

    facts: Mapping[str, Any]
    numel: int

    @property
    def num_images(self) -> int:
        """N."""
        return int(self.facts["num_images"])


def describe_images(digests: Sequence[str]) -> dict[str, Any]:
    """Return what rows depend on of their images (their sha256, in order)."""
    images = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return {"num_images": len(digests), "images": images}


@dataclass
class _Store:
    """Where the rows of one place go while they are computed."""

    place: RowSpec
    file: BlockFile | None
    memory: Tensor | None

    @property
    def num_done(self) -> int:
        """Blocks that are there."""
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
    """Rows of images, from files or through a network.

    Attributes:
        shelf: where files lie.
        device: of the network.
        batch_size: images that go through it at a time.
        precision: of the forward pass.
        dtype: of the rows.
        display: shows progress.
        check_unchanged: raises when samples are not what the facts say.
        num_computed: images that went through the network.
        num_found: rows of the first place that were there.
        lost: why, for the index of each image that could not be decoded. Its rows are NaN.
        distributed: processes of this machine. They compute missing batches in turns; the main process keeps
            them, and all get the same rows.
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
        open_forward: Callable[[Sequence[int]], Forward],
        open_loader: Callable[[], ImageLoader],
        epoch: int,
        words: str,
    ) -> list[Rows]:
        """Return the rows (N, D) of each place: what is kept, and the rest through the network.

        Args:
            places: with the same images.
            open_forward: gives the forward for some of the places, by their index.
            open_loader: gives the images, unshuffled, in batches of :attr:`batch_size`; called when some
                must be computed.
            epoch: of the loader's views.
            words: for the progress bar.

        Raises:
            DataError: an image cannot be read any more.
            OSError: a file cannot be written, and the rows are too many for the memory.
        """
        stores, fault = [_Store(place, None, None) for place in places], None
        missing, done = self.distributed.share(lambda: self._find_missing(stores))
        try:
            if missing:
                some = [stores[number] for number in missing]
                self._compute(open_loader(), some, open_forward(missing), done, epoch, words)
        except (DataError, OSError) as error:
            fault = error
        return self._hand_round(stores, fault)

    def _find_missing(self, stores: Sequence[_Store]) -> tuple[list[int], int]:
        """Open the files; return whose blocks are missing, and how many all of these have."""
        for store in stores:
            self._open(store)
        missing = [
            number for number, store in enumerate(stores) if store.num_done < self._num_blocks(store.place)
        ]
        self.num_found += min(self.batch_size * stores[0].num_done, stores[0].place.num_images)
        return missing, min((stores[number].num_done for number in missing), default=0)

    def _hand_round(self, stores: Sequence[_Store], fault: Exception | None) -> list[Rows]:
        """Return the rows in every process, or raise what went wrong in all of them."""

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
        """Let others remove the files."""
        for file in self._files:
            file.close()

    def discard(self) -> None:
        """Remove the files: what was made from them is written."""
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
                    waiting=wait_for_writer(path, "another run computes the same features", self.display),
                    verified=lambda done: advance(done, ""),
                )
            self._files.append(file)
            if file.was_damaged:
                self.display.warn(f"{path} had changed since it was written; it is made again")
            if not file.is_complete:
                self.cache_dir.make_room(num_bytes - file.num_bytes)
        except OSError as error:
            self._give_up_disk(error, fits_memory)
            return None
        return file

    def _give_up_disk(self, error: OSError, fits_memory: bool) -> None:
        if not fits_memory:
            raise error
        self._fault = error
        self.display.warn(f"features cannot be kept for the next run ({error.strerror or error})")

    def _read(self, file: BlockFile, memory: Tensor | None) -> None:
        for block in file.blocks:
            self.lost |= {int(index): reason for index, reason in (block.note or {}).items()}
        if memory is not None:
            found = torch.frombuffer(file.read(), dtype=DTYPES[self.dtype]).view(-1, memory.shape[1])
            memory[: len(found)] = found

    # --- computing -------------------------------------------------------------------------------

    def _compute(
        self, loader: ImageLoader, stores: list[_Store], forward: Forward, done: int, epoch: int, words: str
    ) -> None:
        """Run the network over the batches that are missing."""
        widths = [store.place.numel for store in stores]
        with (
            self.display.track(words, len(loader.samples)) as advance,
            torch.inference_mode(),
            autocast(self.device, self.precision),
        ):
            advance(done * self.batch_size, "")
            own = self._run_all(loader, ChunkedForward(forward), widths, done, epoch)
            for number, (rows, lost) in enumerate(self.distributed.merge(own), done):
                self.lost |= lost
                for store, some in zip(stores, rows, strict=True):
                    self._store(store, number, some, lost)
                self.num_computed += len(rows[0])
                advance(len(rows[0]), "")

    def _run_all(
        self, loader: ImageLoader, forward: ChunkedForward, widths: list[int], done: int, epoch: int
    ) -> Iterator[tuple[list[Tensor], dict[int, str]]]:
        """Yield the rows of each place and what was lost, for every batch that is this process's turn."""
        batches = loader.batches(epoch, start=done)
        for number, batch in enumerate(batches):
            start = (done + self.distributed.rank + number * self.distributed.size) * self.batch_size
            samples = loader.samples[start : start + self.batch_size]
            self.check_unchanged(samples)
            rows = self._run(forward, batch, start, len(samples), widths)
            yield rows, _find_lost(samples, start, batch.lost)

    def _run(
        self, forward: ChunkedForward, batch: Batch, start: int, size: int, widths: list[int]
    ) -> list[Tensor]:
        """Return rows (size, D) of each place, NaN in those of lost images."""
        dtype = DTYPES[self.dtype]
        whole = len(batch.indices) == size
        if whole:
            rows = forward(batch.images).to("cpu", dtype)
        else:
            rows = torch.full((size, sum(widths)), math.nan, dtype=dtype)
        if not whole and len(batch.indices):
            rows[batch.indices - start] = forward(batch.images).to("cpu", dtype)
        return [part.contiguous() for part in torch.split(rows, widths, dim=1)]

    def _store(self, store: _Store, number: int, rows: Tensor, lost: Mapping[int, str]) -> None:
        """Put a block of rows where it belongs; a file may be further than the others."""
        if store.memory is not None:
            start = number * self.batch_size
            store.memory[start : start + len(rows)] = rows
        if store.file is None or number < store.num_done:
            return
        try:
            store.file.append(rows.view(torch.uint8).numpy().tobytes(), dict(lost) or None)
        except OSError as error:
            self._files.remove(store.file)
            store.file.discard()  # on a full disk, half of it is of no use to anybody
            store.file = None
            self._give_up_disk(error, store.memory is not None)


def _find_lost(samples: Sequence[Sample], start: int, lost: Mapping[str, str]) -> dict[int, str]:
    """By index, not by path: files keep rows of contents, wherever these lie."""
    return {start + place: lost[one.path] for place, one in enumerate(samples) if one.path in lost}
