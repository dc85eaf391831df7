"""Batches on a device, whose content is a function of (seed, epoch, position) alone.

Neither the number of workers nor what was loaded before changes a single pixel: the order of an epoch
comes from (seed, epoch), and the random view of an image from (seed, epoch, its index). So an
interrupted epoch can go on at any batch without replaying the ones before.

Shape legend: B batch, H W pixels.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from finetune.data.dataset import Dataset, Sample
from finetune.data.decode import BadImageError
from finetune.data.image_cache import ImageCache
from finetune.data.transforms import Normalizer, Transform
from finetune.data.workers import (
    NoRoomError,
    WorkerDiedError,
    choose_workers,
    fetch,
    start_pass,
    start_worker,
)
from finetune.errors import DataError, EnvironmentFaultError
from finetune.system.device import BATCHES_PER_WORKER, derive_seed, seed_everything
from finetune.system.distributed import SINGLE_PROCESS, Distributed

MOST_DEATHS = 3
"""Of decoding processes, in a row, before the run is given up."""
BATCHES_BEFORE_GROWTH = 4
"""Batches of each decoding process after which more may start; so long passes need not end first."""
Key = tuple[int, int]
"""(epoch, index into the samples). The epoch travels with the index, so that workers hold no state."""


class Batch(NamedTuple):
    """Some images, less those that could not be read: B may be smaller than was asked for, or 0.

    Attributes:
        images: (B, 3, H, W) float32, normalised; on its way to the device uint8.
        labels: (B,) int64.
        indices: (B,) into the samples.
        lost: why, for the path of each image that could not be read (it could when the run began).
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    lost: dict[str, str]


def plan_epoch(num_samples: int, batch_size: int, seed: int | None, epoch: int) -> list[list[int]]:
    """Return the indices of each batch of an epoch; in order where ``seed`` is None.

    A last batch of one image joins the one before it: BatchNorm cannot train on a single value.
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


def take_share(plan: list[list[int]], distributed: Distributed, shuffled: bool) -> list[list[int]]:
    """Return what one of several processes takes of the batches of an epoch.

    Of batches to learn from, a part of each: all take every step together. Parts have two images or more,
    or none, for BatchNorm cannot train on a single one. Of batches in order, whole ones in turns: what a
    network says of an image depends, in its last bits, on the others of the batch.
    """
    if distributed.size == 1:
        return plan
    return (
        [_part(batch, distributed) for batch in plan]
        if shuffled
        else plan[distributed.rank :: distributed.size]
    )


def _part(batch: list[int], distributed: Distributed) -> list[int]:
    takers = max(1, min(distributed.size, len(batch) // 2))
    if distributed.rank >= takers:
        return []
    return batch[distributed.rank * len(batch) // takers : (distributed.rank + 1) * len(batch) // takers]


class _Lost(NamedTuple):
    """An image that could not be read, in the place of its pixels."""

    path: str
    reason: str


_Item = tuple[Tensor, int, int] | _Lost


@dataclass(frozen=True)
class _Views(TorchDataset[Any]):
    """Views of images; an image that cannot be read becomes a sentence, not an exception."""

    dataset: Dataset
    samples: Sequence[Sample]
    transform: Transform
    seed: int
    images: ImageCache | None

    def __getitem__(self, key: Key) -> _Item:
        epoch, index = key
        sample = self.samples[index]
        kept = self.images[index] if self.images is not None else None
        if kept is not None and not self.transform.is_random:
            return torch.from_numpy(kept.copy()), sample.label, index  # torch wants memory it may write
        try:
            file = self.dataset.file(sample)
            image = self.transform.open(file) if kept is None else Image.fromarray(kept)
        except BadImageError as error:
            return _Lost(sample.path, error.reason)
        seed_everything(self.seed, "view", epoch, index)
        return self.transform(image), sample.label, index


def _collate(items: list[_Item]) -> Batch:
    lost = {item.path: item.reason for item in items if isinstance(item, _Lost)}
    decoded = [item for item in items if not isinstance(item, _Lost)]
    if not decoded:
        nothing = torch.empty(0, dtype=torch.int64)
        return Batch(torch.empty(0, 3, 1, 1, dtype=torch.uint8), nothing, nothing, lost)
    images, labels, indices = zip(*decoded, strict=True)
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


@dataclass(frozen=True)
class Placement:
    """Where batches go: device, and whether in channels-last layout."""

    device: torch.device
    channels_last: bool


class ImageLoader:
    """Batches of some samples of a dataset.

    Args:
        dataset: resolves a sample to a file.
        samples: which images, and their labels.
        transform: file to view.
        batch_size: images a batch.
        placement: device and layout of the images.
        workers: decoding processes; 0 decodes here.
        seed: of the views.
        shuffle: a new order every epoch; otherwise the order of ``samples``.
        warn: told of decoding processes that ended or could not work.
        images: kept ones of these samples. They change no bit of a batch.
        max_workers: that ``workers`` may grow to where batches are waited for.
        persistent: decoding processes wait for the next pass, rather than end with each one.
        allow_lost: batches may lack images that cannot be read; shuffled ones always may.
        distributed: processes that share the batches.

    Attributes:
        input_size: (3, H, W) of the images.
        wait_seconds: time the last pass spent waiting for data.
        workers: decoding processes, now and in the next pass.
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
        images: ImageCache | None = None,
        max_workers: int = 0,
        persistent: bool = True,
        allow_lost: bool = False,
        distributed: Distributed = SINGLE_PROCESS,
    ) -> None:
        assert images is None or len(images) == len(samples)
        self.samples, self.batch_size, self.placement = tuple(samples), batch_size, placement
        self.seed, self.shuffle, self.warn = seed, shuffle, warn
        self.allow_lost, self.distributed = shuffle or allow_lost, distributed
        self.input_size: tuple[int, int, int] | None = transform.preprocessing.input_size
        self.wait_seconds, self._persistent = 0.0, persistent
        # A view that is kept whole is copied faster than it is handed over from another process.
        is_finished = images is not None and not transform.is_random
        self.workers, self._most_workers = (0, 0) if is_finished else (workers, max_workers)
        self._views = _Views(dataset, self.samples, transform, seed, images)
        self._normalize = Normalizer(transform.preprocessing, placement.device)
        self._batches = _Batches()
        self._loader = self._build()

    def _build(self) -> DataLoader[Any]:
        return DataLoader(
            self._views,
            batch_sampler=self._batches,
            num_workers=self.workers,
            collate_fn=_collate,
            # Only from pinned memory does a GPU copy without this process; on a CPU it is one copy too many.
            pin_memory=self.placement.device.type == "cuda",
            # More would wait in /dev/shm, and help only where the time of a batch swings.
            prefetch_factor=BATCHES_PER_WORKER - 1 if self.workers else None,
            persistent_workers=self._persistent and self.workers > 0,
            worker_init_fn=partial(start_worker, os.getpid()),
            # Forked, a worker is this process's own child, and ends with it.
            multiprocessing_context="fork" if self.workers and sys.platform == "linux" else None,
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

    def batches(
        self, epoch: int = 0, start: int = 0, stop: int | None = None, whole: bool = False
    ) -> Iterator[Batch]:
        """Yield the batches of an epoch on the device, from number ``start`` up to ``stop``.

        Among several processes these are its own share, but for ``whole`` (:func:`take_share`).

        A decoding process that dies is replaced, and its batch made again: content does not depend on
        processes. Where batches cannot be handed over between processes, this one decodes. Where they are
        waited for, more processes decode the rest. Batches may lack images, which they name, where that is
        allowed.

        Raises:
            DataError: an image cannot be read (it could when the run began), and none may be lost: metrics
                over fewer images than the user counted would look like any others.
            EnvironmentFaultError: decoding processes die again and again.
        """
        plan = self.plan(epoch)[start:stop]
        plan = plan if whole else take_share(plan, self.distributed, self.shuffle)
        keys = [[(epoch, index) for index in batch] for batch in plan]
        self.wait_seconds = began = waited_before = 0.0
        done = deaths = 0
        while done < len(keys):
            try:
                for number, batch in enumerate(self._pass(keys[done:])):
                    if number == 0:  # until here processes started, which says nothing of their number
                        began, waited_before = time.perf_counter(), self.wait_seconds
                    done, deaths = done + 1, 0
                    yield batch
                    is_time = number and number % (BATCHES_BEFORE_GROWTH * max(1, self.workers)) == 0
                    if is_time and done < len(keys) and self._grow(began, waited_before):
                        break  # what these processes have prepared beyond is made again
            except NoRoomError as error:
                self._decode_here(error)
            except WorkerDiedError as error:
                deaths += 1
                self._replace_workers(deaths, str(error))
        self._grow(began, waited_before)

    def _pass(self, keys: list[list[Key]]) -> Iterator[Batch]:
        self._batches.keys = keys
        iterator = start_pass(self._loader)
        while True:
            began = time.perf_counter()
            batch = fetch(self._loader, iterator)
            self.wait_seconds += time.perf_counter() - began
            if batch is None:
                return
            if batch.lost and not self.allow_lost:
                raise _lost_error(batch.lost)
            yield self._place(batch)

    def _grow(self, began: float, waited_before: float) -> bool:
        """Take more decoding processes if too much of the time since ``began`` was spent waiting for them."""
        waited, seconds = self.wait_seconds - waited_before, time.perf_counter() - began
        chosen = choose_workers(self.workers, self._most_workers, waited, seconds)
        if chosen == self.workers:
            return False
        self.workers = chosen
        self._loader = self._build()
        return True

    def _replace_workers(self, deaths: int, found: str) -> None:
        if deaths > MOST_DEATHS:
            fix = "Lower --workers (0 needs none); where memory is short, the system kills them first."
            raise EnvironmentFaultError(f"decoding with {_count(self.workers)}", found, fix)
        self.warn(f"a decoding process ended ({found}); it is replaced")
        self._loader = self._build()

    def _decode_here(self, error: NoRoomError) -> None:
        self.warn(
            f"decoding processes cannot hand over their batches ({error}); the training process decodes from "
            f"here on, which is slower ({error.remedy})"
        )
        self.workers = 0
        self._loader = self._build()

    def _place(self, batch: Batch) -> Batch:
        device = self.placement.device
        layout = torch.channels_last if self.placement.channels_last else torch.contiguous_format
        # The layout comes last: on a CPU, arithmetic that changes it on the way takes three times as long.
        images = self._normalize(batch.images.to(device, non_blocking=True)).to(memory_format=layout)
        return Batch(images, batch.labels.to(device, non_blocking=True), batch.indices, batch.lost)


def _count(workers: int) -> str:
    return f"{workers} process{'' if workers == 1 else 'es'}"


def _lost_error(lost: dict[str, str]) -> DataError:
    found = "; ".join(f"{path} ({reason})" for path, reason in lost.items())
    fix = "Restore or remove the file, and start again."
    return DataError("reading an image that was readable before", found, fix)
