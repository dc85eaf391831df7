"""Batches on a device, whose content is a function of (seed, epoch, position) alone.

Neither the number of workers nor what was loaded before changes a single pixel: the order of an epoch
comes from (seed, epoch), and the random view of a picture from (seed, epoch, its index). So an
interrupted epoch can go on at any batch without replaying the ones before.

Shape legend: B batch, H W pixels.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from finetune.data.decode import BadImageError, decode_image
from finetune.data.sample import Dataset, Sample
from finetune.data.transforms import Transform
from finetune.errors import DataError, EnvironmentFaultError
from finetune.runtime import derive_seed, seed_everything
from finetune.stopping import end_with_parent

MOST_DEATHS = 3
"""Of decoding processes, in a row, before the run is given up."""
_NO_SHARED_MEMORY = ("Bus error", "No space left on device", "shared memory")
Key = tuple[int, int]
"""(epoch, index into the samples). The epoch travels with the index, so that workers hold no state."""


class Batch(NamedTuple):
    """Some pictures, less those that could not be read: B may be smaller than was asked for, or 0.

    Attributes:
        images: (B, 3, H, W) float32.
        labels: (B,) int64.
        indices: (B,) into the samples.
        lost: why, for the path of each picture that could not be read (it could when the run began).
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    lost: dict[str, str]


def plan_epoch(num_samples: int, batch_size: int, seed: int | None, epoch: int) -> list[list[int]]:
    """Return the indices of each batch of an epoch; in order where ``seed`` is None.

    A last batch of one picture joins the one before it: BatchNorm cannot train on a single value.
    """
    if seed is None:
        order = list(range(num_samples))
    else:
        generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
        order = torch.randperm(num_samples, generator=generator).tolist()
    batches = [order[start : start + batch_size] for start in range(0, num_samples, batch_size)]
    if seed is not None and len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches


class _Lost(NamedTuple):
    """A picture that could not be read, in the place of its pixels."""

    path: str
    reason: str


_Item = tuple[Tensor, int, int] | _Lost


class _Pictures(TorchDataset[Any]):
    """Decodes and transforms one picture; a picture that fails becomes a sentence, not an exception."""

    def __init__(self, dataset: Dataset, samples: Sequence[Sample], transform: Transform, seed: int) -> None:
        self.dataset, self.samples, self.transform, self.seed = dataset, samples, transform, seed

    def __getitem__(self, key: Key) -> _Item:
        epoch, index = key
        sample = self.samples[index]
        try:
            image = decode_image(self.dataset.file(sample))
        except BadImageError as error:
            return _Lost(sample.path, error.reason)
        seed_everything(self.seed, "view", epoch, index)
        return self.transform(image), sample.label, index


def _collate(items: list[_Item]) -> Batch:
    lost = {item.path: item.reason for item in items if isinstance(item, _Lost)}
    pictures = [item for item in items if not isinstance(item, _Lost)]
    if not pictures:
        nothing = torch.empty(0, dtype=torch.int64)
        return Batch(torch.empty(0, 3, 1, 1), nothing, nothing, lost)
    images, labels, indices = zip(*pictures, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), torch.tensor(indices), lost)


class _Batches:
    """What the loader's next pass reads: set before every pass, read in this process only."""

    def __init__(self) -> None:
        self.keys: list[list[Key]] = []

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


def _start_worker(_: int) -> None:
    """Stopping is the trainer's business: workers leave its process group, to which terminals and batch
    systems send their signals. They end when the loader says so, and the kernel ends them with their parent.
    """
    end_with_parent(os.getppid())
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@dataclass(frozen=True)
class Placement:
    """Where batches go: device, and whether in channels-last layout."""

    device: torch.device
    channels_last: bool


class Loader:
    """Batches of some samples of a dataset.

    Args:
        dataset: resolves a sample to a file.
        samples: which pictures, and their labels.
        transform: picture to tensor.
        batch_size: pictures a batch.
        placement: device and layout of the images.
        workers: decoding processes; 0 decodes here.
        seed: of the views.
        shuffle: a new order every epoch; otherwise the order of ``samples``.

    Attributes:
        wait_seconds: time the last pass spent waiting for data.
    """

    def __init__(
        self,
        dataset: Dataset,
        samples: Sequence[Sample],
        transform: Transform,
        *,
        batch_size: int,
        placement: Placement,
        workers: int,
        seed: int,
        shuffle: bool,
    ) -> None:
        self.samples, self.batch_size, self.placement = tuple(samples), batch_size, placement
        self.seed, self.shuffle = seed, shuffle
        self.wait_seconds = 0.0
        self._workers = workers
        self._pictures = _Pictures(dataset, self.samples, transform, seed)
        self._batches = _Batches()
        self._loader = self._build()

    def _build(self) -> DataLoader[Any]:
        return DataLoader(
            self._pictures,
            batch_sampler=self._batches,
            num_workers=self._workers,
            collate_fn=_collate,
            pin_memory=self.placement.device.type == "cuda",
            # Evaluation's processes end with each pass: those of two loaders would share cores and /dev/shm.
            persistent_workers=self.shuffle and self._workers > 0,
            worker_init_fn=_start_worker,
        )

    def close(self) -> None:
        """End the decoding processes, rather than leave them to the end of the program."""
        del self._loader

    def num_batches(self, epoch: int = 0) -> int:
        """Return how many batches a pass has."""
        return len(self.plan(epoch))

    def plan(self, epoch: int) -> list[list[int]]:
        """Return the indices of each batch of an epoch."""
        return plan_epoch(len(self.samples), self.batch_size, self.seed if self.shuffle else None, epoch)

    def batches(self, epoch: int = 0, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Yield the batches of an epoch on the device, from number ``start`` up to ``stop``.

        A decoding process that dies is replaced, and its batch made again: content does not depend on
        processes. Batches of a shuffled loader may lack pictures, which they name.

        Raises:
            DataError: a picture cannot be read (it could when the run began), and the loader is not
                shuffled: figures over fewer pictures than the user counted would look like any others.
            EnvironmentFaultError: decoding processes die again and again.
        """
        keys = [[(epoch, index) for index in batch] for batch in self.plan(epoch)[start:stop]]
        self.wait_seconds = 0.0
        done = deaths = 0
        while done < len(keys):
            try:
                for batch in self._pass(keys[done:]):
                    done, deaths = done + 1, 0
                    yield batch
            except _WorkerDiedError as error:
                deaths += 1
                self._replace_workers(deaths, str(error))

    def _pass(self, keys: list[list[Key]]) -> Iterator[Batch]:
        self._batches.keys = keys
        iterator = _iterate(self._loader)
        while True:
            began = time.perf_counter()
            batch = _next(iterator)
            self.wait_seconds += time.perf_counter() - began
            if batch is None:
                return
            if batch.lost and not self.shuffle:
                raise _lost_error(batch.lost)
            yield self._place(batch)

    def _replace_workers(self, deaths: int, found: str) -> None:
        """Start new processes; none at all where /dev/shm is what they die of."""
        if any(word in found for word in _NO_SHARED_MEMORY):
            self._workers = 0
        elif deaths > MOST_DEATHS:
            fix = "Lower --workers; where memory is short they are the first to be killed."
            raise EnvironmentFaultError(f"decoding with {self._workers} processes", found, fix)
        self._loader = self._build()

    def _place(self, batch: Batch) -> Batch:
        device = self.placement.device
        layout = torch.channels_last if self.placement.channels_last else torch.contiguous_format
        images = batch.images.to(device, non_blocking=True, memory_format=layout)
        return Batch(images, batch.labels.to(device, non_blocking=True), batch.indices, batch.lost)


class _WorkerDiedError(Exception):
    """A decoding process ended in the middle of its work."""


def _iterate(loader: DataLoader[Any]) -> Any:
    """Start a pass, without torch's handler for the end of a child.

    That one raises wherever this process happens to be, in the middle of an optimiser step as well. A death
    is seen without it, a few seconds later, where a batch is waited for.
    """
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGCHLD, before)


def _next(iterator: Any) -> Batch | None:
    try:
        batch: Batch | None = next(iterator, None)
    except RuntimeError as error:
        if not any(word in str(error) for word in (*_NO_SHARED_MEMORY, "DataLoader worker")):
            raise
        raise _WorkerDiedError(str(error).strip().splitlines()[-1]) from None
    return batch


def _lost_error(lost: dict[str, str]) -> DataError:
    found = "; ".join(f"{path} ({reason})" for path, reason in lost.items())
    fix = "Restore or remove the file, and start again."
    return DataError("reading an image that was readable before", found, fix)
