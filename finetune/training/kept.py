"""What the frozen trunk makes of each picture and view: computed once, kept, and fed to what learns.

Kept on disk, for this run when it goes on and for the next one on the same pictures, whatever its head,
rate, seed or number of epochs. What the rows depend on is in the file's name: weights, cut, views, pictures
and their order, versions and hardware.

Shape legend: N pictures, B batch, D numbers that the cut carries for one picture.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from finetune.cache.blocks import BlockFile
from finetune.cache.shelf import Shelf
from finetune.cache.waiting import Waiting
from finetune.data.loader import Batch, Loader, Placement, plan_epoch
from finetune.data.sample import Sample
from finetune.display import Display
from finetune.errors import DataError
from finetune.evaluation.predict import InParts, autocast
from finetune.runtime import DTYPES, Precision, compute_part_size
from finetune.training.trunk import row_bytes
from pretrained.split import Split

FORMAT = 1
GPU_BATCH = 128
"""Pictures that go through the trunk at a time on a GPU."""
MEMORY_BYTES = 2**26
"""Rows of a run that are held in memory; more stay in their files and are read as they are needed."""


def compute_batch_size(device: torch.device, input_size: tuple[int, int, int]) -> int:
    """Return how many pictures go through the trunk at a time.

    Nothing but device and size decides, whatever the recipe's batch size is: last bits depend on it. (Only
    where a GPU's memory runs out even so, smaller parts go through.)
    """
    return GPU_BATCH if device.type == "cuda" else compute_part_size(*input_size[1:])


class Rows(Protocol):
    """Rows of pictures, in memory or not: a tensor (N, D) is one."""

    def __getitem__(self, indices: Tensor, /) -> Tensor:
        """Return rows (B, D)."""
        ...


class FileRows:
    """Rows that stay in their file.

    They are read, not mapped: mapped pages would count as memory of this process, which then grows with the
    folder.

    Args:
        path: of the rows, one after the other.
        numel: D.
        dtype: of the rows.
    """

    def __init__(self, path: Path, numel: int, dtype: torch.dtype) -> None:
        self._file = path.open("rb", buffering=0)
        self._numel, self._dtype = numel, dtype

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return rows (B, D).

        Raises:
            DataError: the file was cut short.
        """
        rows = torch.empty(len(indices), self._numel, dtype=self._dtype)
        content: Any = rows.view(torch.uint8).view(-1).numpy()
        num_bytes = self._numel * self._dtype.itemsize
        for place, index in enumerate(indices.tolist()):
            row = content[place * num_bytes : (place + 1) * num_bytes]
            done = os.preadv(self._file.fileno(), [row], index * num_bytes)
            if done != num_bytes:  # one call reads up to 2 GB of a file on a disk
                found = f"{self._file.name} ends before row {index + 1}"
                fix = "Run `finetune cache clear`, and start the same command again."
                raise DataError("reading kept features", found, fix)
        return rows


class KeptRows:
    """Rows of pictures, from files or through the trunk.

    Args:
        split: the network cut in two.
        facts: what all rows depend on.
        shelf: where files lie.
        device: of the network.
        input_size: (C, H, W) of the pictures.
        precision: of the trunk's forward pass.
        dtype: of the rows.
        display: shows progress.
        check_unchanged: raises when samples are not what the facts say.

    Attributes:
        batch_size: pictures that go through the trunk at a time.
        num_computed: pictures that went through the trunk.
        num_found: pictures whose rows were there.
    """

    def __init__(
        self,
        split: Split,
        facts: Mapping[str, Any],
        shelf: Shelf,
        *,
        device: torch.device,
        input_size: tuple[int, int, int],
        precision: Precision,
        dtype: Precision,
        display: Display,
        check_unchanged: Callable[[Sequence[Sample]], None] = lambda _: None,
    ) -> None:
        self._check_unchanged = check_unchanged
        self.batch_size = compute_batch_size(device, input_size)
        self.split, self.shelf, self.display = split, shelf, display
        self.precision, self.dtype = precision, dtype
        self.num_computed = self.num_found = 0
        self._facts = {
            "kind": "trunk",
            "format": FORMAT,
            "cut": split.cut.name,
            "numel": split.packing.numel,
            "dtype": dtype,
            "batch_size": self.batch_size,
            **facts,
        }
        self._files: list[BlockFile] = []
        self._fault: OSError | None = None  # of the disk
        self._num_bytes = 0  # held in memory

    def facts_of(self, view: Mapping[str, Any], digests: Sequence[str]) -> dict[str, Any]:
        """Return everything that the rows of these pictures (their sha256, in order) in a view depend on."""
        pictures = hashlib.sha256("\n".join(digests).encode()).hexdigest()
        return self._facts | dict(view) | {"num_images": len(digests), "images": pictures}

    def rows(
        self, open_loader: Callable[[], Loader], facts: Mapping[str, Any], epoch: int, words: str
    ) -> Rows:
        """Return rows (N, D) of pictures: those that are kept, and the others through the trunk.

        Args:
            open_loader: gives the pictures, unshuffled, in batches of :attr:`batch_size`; called when some
                must be computed.
            facts: of :meth:`facts_of`.
            epoch: of the loader's views.
            words: for the progress bar.

        Raises:
            DataError: a picture cannot be read any more.
            OSError: the file cannot be written, and the rows are too many for the memory.
        """
        num_images: int = facts["num_images"]
        num_bytes = num_images * row_bytes(self.split.packing.numel, self.dtype)
        in_memory = self._empty(num_images) if self._num_bytes + num_bytes <= MEMORY_BYTES else None
        self._num_bytes += num_bytes if in_memory is not None else 0
        file = self._open(facts, num_bytes, in_memory is not None)
        done = len(file.blocks) if file is not None else 0
        if file is not None and done:
            self._read(file, in_memory)
        if done < math.ceil(num_images / self.batch_size):
            self._compute(open_loader(), file, done, epoch, in_memory, words)
        if in_memory is not None:
            return in_memory
        assert file is not None
        return FileRows(file.path, self.split.packing.numel, DTYPES[self.dtype])

    def close(self) -> None:
        """Let others remove the files."""
        for file in self._files:
            file.close()

    # --- files -----------------------------------------------------------------------------------

    def _empty(self, num_images: int) -> Tensor:
        return torch.empty(num_images, self.split.packing.numel, dtype=DTYPES[self.dtype])

    def _open(self, facts: Mapping[str, Any], num_bytes: int, fits_memory: bool) -> BlockFile | None:
        path = self.shelf.place(facts)
        if self._fault is not None:
            if not fits_memory:
                raise self._fault
            return None
        try:
            with self.display.track("comparing kept features", num_bytes) as advance:
                file = BlockFile(
                    path,
                    facts,
                    math.ceil(facts["num_images"] / self.batch_size),
                    waiting=Waiting(path, "another run computes the same features", self.display),
                    verified=lambda done: advance(done, ""),
                )
            self._files.append(file)
            if file.was_damaged:
                self.display.warn(f"{path} had changed since it was written; it is made again")
            if not file.is_complete:
                self.shelf.make_room(num_bytes - file.num_bytes)
        except OSError as error:
            self._give_up_disk(error, fits_memory)
            return None
        return file

    def _give_up_disk(self, error: OSError, fits_memory: bool) -> None:
        if not fits_memory:
            raise error
        self._fault = error
        self.display.warn(f"features cannot be kept for the next run ({error.strerror or error})")

    def _read(self, file: BlockFile, in_memory: Tensor | None) -> None:
        num_bytes = file.num_bytes
        if in_memory is not None:
            found = torch.frombuffer(file.read(), dtype=DTYPES[self.dtype]).view(-1, in_memory.shape[1])
            in_memory[: len(found)] = found
        self.num_found += num_bytes // row_bytes(self.split.packing.numel, self.dtype)

    # --- computing -------------------------------------------------------------------------------

    def _compute(
        self,
        loader: Loader,
        file: BlockFile | None,
        done: int,
        epoch: int,
        in_memory: Tensor | None,
        words: str,
    ) -> None:
        """Run the trunk over the batches that are missing."""
        trunk = InParts(self.split.trunk)
        device = loader.placement.device
        place = done * self.batch_size
        with (
            self.display.track(words, len(loader.samples)) as advance,
            torch.inference_mode(),
            autocast(device, self.precision),
        ):
            advance(place, "")
            for batch in loader.batches(epoch, start=done):
                self._check_unchanged([loader.samples[index] for index in batch.indices.tolist()])
                rows = trunk(batch.images).to("cpu", DTYPES[self.dtype]).contiguous()
                if in_memory is not None:
                    in_memory[place : place + len(rows)] = rows
                if file is not None:
                    file = self._append(file, rows, in_memory is not None)
                place += len(rows)
                self.num_computed += len(rows)
                advance(len(rows), "")

    def _append(self, file: BlockFile, rows: Tensor, fits_memory: bool) -> BlockFile | None:
        try:
            file.append(rows.view(torch.uint8).numpy().tobytes())
        except OSError as error:
            self._files.remove(file)
            file.discard()  # on a full disk, half of it is of no use to anybody
            self._give_up_disk(error, fits_memory)
            return None
        return file


class RowLoader:
    """Batches of kept rows: a :class:`finetune.data.feed.Feed` whose images are rows (B, D).

    Args:
        views: rows (N, D) of each view; epoch by epoch the next one is taken.
        samples: their pictures.
        batch_size: rows a batch.
        placement: device of the batches.
        seed: of the order.
        shuffle: a new order every epoch; otherwise that of ``samples``.
    """

    def __init__(
        self,
        views: Sequence[Rows],
        samples: Sequence[Sample],
        *,
        batch_size: int,
        placement: Placement,
        seed: int,
        shuffle: bool,
    ) -> None:
        self.views, self.samples = tuple(views), tuple(samples)
        self.batch_size, self.placement = batch_size, placement
        self.seed, self.shuffle = seed, shuffle
        self.wait_seconds = 0.0
        self.input_size: tuple[int, int, int] | None = None
        self._labels = torch.tensor([sample.label for sample in self.samples])

    def num_batches(self, epoch: int = 0) -> int:
        """Return how many batches a pass has."""
        return len(self._plan(epoch))

    def batches(self, epoch: int = 0, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Yield the batches of an epoch on the device, from number ``start`` up to ``stop``."""
        rows = self.views[epoch % len(self.views)]
        self.wait_seconds = 0.0
        for batch in self._plan(epoch)[start:stop]:
            began = time.perf_counter()
            indices = torch.tensor(batch)
            images, labels = self._place(rows[indices]), self._place(self._labels[indices])
            self.wait_seconds += time.perf_counter() - began
            yield Batch(images, labels, indices, {})

    def _plan(self, epoch: int) -> list[list[int]]:
        return plan_epoch(len(self.samples), self.batch_size, self.seed if self.shuffle else None, epoch)

    def _place(self, tensor: Tensor) -> Tensor:
        device = self.placement.device
        if device.type != "cuda":
            return tensor.to(device)
        return tensor.pin_memory().to(device, non_blocking=True)
