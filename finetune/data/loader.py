"""Batches on a device, whose content is a function of (seed, epoch, position) alone.

Neither the number of workers nor what was loaded before changes a single pixel: the order of an epoch
comes from (seed, epoch), and the random view of a picture from (seed, epoch, its index). So an
interrupted epoch can go on at any batch without replaying the ones before.

Shape legend: B batch, H W pixels.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from finetune.data.decode import BadImageError, decode_image
from finetune.data.sample import Dataset, Sample
from finetune.data.transforms import Transform
from finetune.errors import DataError, EnvironmentFaultError
from finetune.runtime import derive_seed, seed_everything
from finetune.stopping import end_with_parent

MOST_DEATHS = 3
"""Of decoding processes, in a row, before the run is given up."""
_NO_ROOM = (
    "No space left on device",  # of /dev/shm
    "shared memory",
    "Too many open files",
    "ancdata",  # the same, on the receiving side
    "Resource temporarily unavailable",  # too many processes
    "Cannot allocate memory",
)
"""What the system says where decoding processes cannot be started, or cannot hand over their batches."""
_DEATH = ("exited unexpectedly", "killed by signal")
"""What torch says of a process that ended, and of its own thread that met one."""
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
    return _share(Batch(torch.stack(images), torch.tensor(labels), torch.tensor(indices), lost))


def _share(batch: Batch) -> Batch:
    """Put a batch into shared memory now, in a decoding process.

    Its queue would do so in a thread of its own, where no space left is a line on stderr and a batch that
    never comes.
    """
    if get_worker_info() is not None:
        for tensor in batch[:3]:
            tensor.share_memory_()  # type: ignore[no-untyped-call]
    return batch


class _Batches:
    """What the loader's next pass reads: set before every pass, read in this process only."""

    def __init__(self) -> None:
        self.keys: list[list[Key]] = []

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


def _start_worker(parent: int, _: int) -> None:
    """Stopping is the trainer's business: workers leave its process group, to which terminals and batch
    systems send their signals. They end when the loader says so, and the kernel ends them with their parent.
    """
    end_with_parent(parent)
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
        warn: told of decoding processes that ended or could not work.

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
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.samples, self.batch_size, self.placement = tuple(samples), batch_size, placement
        self.seed, self.shuffle, self.warn = seed, shuffle, warn
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
            worker_init_fn=partial(_start_worker, os.getpid()),
            # Forked, a worker is this process's own child, and ends with it.
            multiprocessing_context="fork" if self._workers and sys.platform == "linux" else None,
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
        processes. Where batches cannot be handed over between processes, this one decodes. Batches of a
        shuffled loader may lack pictures, which they name.

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
            except _NoRoomError as error:
                self._decode_here(str(error))
            except _WorkerDiedError as error:
                deaths += 1
                self._replace_workers(deaths, str(error))

    def _pass(self, keys: list[list[Key]]) -> Iterator[Batch]:
        self._batches.keys = keys
        iterator = _iterate(self._loader)
        while True:
            began = time.perf_counter()
            batch = _next(self._loader, iterator)
            self.wait_seconds += time.perf_counter() - began
            if batch is None:
                return
            if batch.lost and not self.shuffle:
                raise _lost_error(batch.lost)
            yield self._place(batch)

    def _replace_workers(self, deaths: int, found: str) -> None:
        if deaths > MOST_DEATHS:
            fix = "Lower --workers (0 needs none); where memory is short, they are the first to be killed."
            raise EnvironmentFaultError(f"decoding with {_count(self._workers)}", found, fix)
        self.warn(f"a decoding process ended ({found}); it is replaced")
        self._loader = self._build()

    def _decode_here(self, found: str) -> None:
        self.warn(
            f"decoding processes cannot hand over their batches ({found}); the training process decodes from "
            "here on, which is slower (more shared memory helps: docker run --shm-size 8g)"
        )
        self._workers = 0
        self._loader = self._build()

    def _place(self, batch: Batch) -> Batch:
        device = self.placement.device
        layout = torch.channels_last if self.placement.channels_last else torch.contiguous_format
        images = batch.images.to(device, non_blocking=True, memory_format=layout)
        return Batch(images, batch.labels.to(device, non_blocking=True), batch.indices, batch.lost)


def _count(workers: int) -> str:
    return f"{workers} process{'' if workers == 1 else 'es'}"


class _WorkerDiedError(Exception):
    """A decoding process ended in the middle of its work."""


class _NoRoomError(Exception):
    """Decoding processes cannot be started, or cannot hand over what they made."""


def _iterate(loader: DataLoader[Any]) -> Any:
    """Start a pass, without torch's handler for the end of a child.

    That one raises wherever this process happens to be, in the middle of an optimiser step as well. A death
    is seen without it, a few seconds later, where a batch is waited for.
    """
    with _named_faults(loader):
        if threading.current_thread() is not threading.main_thread():
            return iter(loader)
        before = signal.getsignal(signal.SIGCHLD)
        try:
            return iter(loader)
        finally:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


def _next(loader: DataLoader[Any], iterator: Any) -> Batch | None:
    with _named_faults(loader):
        batch: Batch | None = next(iterator, None)
    return batch


@contextmanager
def _named_faults(loader: DataLoader[Any]) -> Iterator[None]:
    """Tell faults of decoding processes from errors of what they carry out, which pass as they are."""
    try:
        yield
    except (OSError, EOFError, RuntimeError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        if loader.num_workers == 0:
            raise
        for word in _NO_ROOM:
            if word in str(error):
                raise _NoRoomError(word) from None
        forwarded = said[0].startswith("Caught ")
        # Between its end and the notice of it, a process leaves sockets that nobody answers.
        if not forwarded and (not isinstance(error, RuntimeError) or any(word in said[0] for word in _DEATH)):
            raise _WorkerDiedError(said[-1]) from None
        raise


def _lost_error(lost: dict[str, str]) -> DataError:
    found = "; ".join(f"{path} ({reason})" for path, reason in lost.items())
    fix = "Restore or remove the file, and start again."
    return DataError("reading an image that was readable before", found, fix)
