"""Batches on a device, whose content is a function of (seed, epoch, position) alone.

Neither the number of workers nor what was loaded before changes a single pixel: the order of an epoch
comes from (seed, epoch), and the random view of an image from (seed, epoch, its index). So an
interrupted epoch can be resumed at any batch without replaying the ones before.

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
    WorkerDiedError,
    WorkerResourceError,
    choose_workers,
    fetch,
    start_pass,
    start_worker,
)
from finetune.errors import DataError, EnvironmentFaultError
from finetune.system.device import BATCHES_PER_WORKER, derive_seed, seed_everything
from finetune.system.distributed import SINGLE_PROCESS, Distributed

MOST_DEATHS = 3
"""Decoding processes that may die in a row before the run fails."""
BATCHES_BEFORE_GROWTH = 4
"""Batches of each decoding process after which more may start, so that a long pass need not end first."""
Key = tuple[int, int]
"""(epoch, index into the samples). The epoch travels with the index, so that workers hold no state."""


class Batch(NamedTuple):
    """A batch without the images that could not be read: B may be smaller than the batch size, or 0.

    Attributes:
        images: (B, C, H, W) float32, normalised; those of images are uint8 until they are on the device.
        labels: (B,) int64, or as :meth:`finetune.targets.Target.encode` gives them.
        indices: (B,) int64, indices into the loader's samples.
        lost: the reason for each image that can no longer be read, by path.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    lost: dict[str, str]


def plan_epoch(num_samples: int, batch_size: int, seed: int | None, epoch: int) -> list[list[int]]:
    """Return the indices of each batch of an epoch; in order if ``seed`` is None.

    A last batch of one image is merged into the one before it: BatchNorm cannot train on a single value.
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
    """Return the share of one rank in the batches of an epoch.

    Shuffled batches are for training: each rank takes a slice of every batch, since all ranks take every step
    together. A slice has two images or more, or none, because BatchNorm cannot train on a single one. Of
    ordered batches, each rank takes every n-th one whole: the last bits of an image's output depend on the
    other images in its batch.
    """
    if distributed.size == 1:
        return plan
    return (
        [_slice_batch(batch, distributed) for batch in plan]
        if shuffled
        else plan[distributed.rank :: distributed.size]
    )


def _slice_batch(batch: list[int], distributed: Distributed) -> list[int]:
    takers = max(1, min(distributed.size, len(batch) // 2))
    if distributed.rank >= takers:
        return []
    return batch[distributed.rank * len(batch) // takers : (distributed.rank + 1) * len(batch) // takers]


class _UnreadableImage(NamedTuple):
    """Stands for an image that could not be read."""

    path: str
    reason: str


_Item = tuple[Tensor, Tensor, int] | _UnreadableImage


@dataclass(frozen=True)
class _ViewDataset(TorchDataset[Any]):
    """Views of images; an image that cannot be read becomes an ``_UnreadableImage``, not an exception."""

    dataset: Dataset
    samples: Sequence[Sample]
    transform: Transform
    seed: int
    images: ImageCache | None
    labels: Tensor

    def __getitem__(self, key: Key) -> _Item:
        epoch, index = key
        sample = self.samples[index]
        kept = self.images[index] if self.images is not None else None
        if kept is not None and not self.transform.is_random:
            return torch.from_numpy(kept.copy()), self.labels[index], index  # torch requires writable memory
        try:
            file = self.dataset.file(sample)
            image = self.transform.open(file) if kept is None else Image.fromarray(kept)
        except BadImageError as error:
            return _UnreadableImage(sample.path, error.reason)
        seed_everything(self.seed, "view", epoch, index)
        return self.transform(image), self.labels[index], index


def _collate(items: list[_Item]) -> Batch:
    lost = {item.path: item.reason for item in items if isinstance(item, _UnreadableImage)}
    decoded = [item for item in items if not isinstance(item, _UnreadableImage)]
    if not decoded:
        nothing = torch.empty(0, dtype=torch.int64)
        return Batch(torch.empty(0, 3, 1, 1, dtype=torch.uint8), nothing, nothing, lost)
    images, labels, indices = zip(*decoded, strict=True)
    return _share(Batch(torch.stack(images), torch.stack(labels), torch.tensor(indices), lost))


def _share(batch: Batch) -> Batch:
    """Move a batch into shared memory, if this is a decoding process.

    Otherwise the worker's queue does so in its own thread, where a full /dev/shm only prints a line on stderr
    and the batch never arrives.
    """
    if get_worker_info() is not None:
        for tensor in batch[:3]:
            tensor.share_memory_()  # type: ignore[no-untyped-call]
    return batch


class _KeySampler:
    """Batch sampler with the keys of the next pass; they are set before every pass."""

    def __init__(self) -> None:
        self.keys: list[list[Key]] = []

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class Placement:
    """The device of batches, and whether images are in channels-last layout."""

    device: torch.device
    channels_last: bool

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory layout of images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


class ImageLoader:
    """Batches of some samples of a dataset.

    Args:
        dataset: the dataset of the samples, which resolves them to files.
        samples: the images to load, with their labels.
        transform: makes a view from a file.
        batch_size: images per batch.
        placement: device and memory layout of the images.
        workers: number of decoding processes; 0 decodes in this process.
        seed: seed of the order and of random views.
        shuffle: whether every epoch has a new order; otherwise it is that of ``samples``.
        warn: called with a message when a decoding process dies or cannot work.
        images: cached images of these samples; they do not change a bit of a batch.
        max_workers: the number that ``workers`` may grow to if the caller waits for batches.
        persistent: whether decoding processes wait for the next pass instead of ending with each one.
        allow_lost: whether batches may lack images that cannot be read; shuffled ones always may.
        distributed: rank and number of the processes that share the batches.

    Attributes:
        input_size: (C, H, W) of the images.
        target: what the labels are.
        wait_seconds: time the last pass spent waiting for data.
        workers: number of decoding processes, now and in the next pass.
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
        # Copying a cached view is faster than receiving it from another process.
        is_finished = images is not None and not transform.is_random
        self.workers, self._most_workers = (0, 0) if is_finished else (workers, max_workers)
        self.target = dataset.target
        self._views = _ViewDataset(
            dataset, self.samples, transform, seed, images, dataset.encode(self.samples)
        )
        self._normalize = Normalizer(transform.preprocessing, placement.device)
        self._batches = _KeySampler()
        self._loader = self._build()

    def _build(self) -> DataLoader[Any]:
        return DataLoader(
            self._views,
            batch_sampler=self._batches,
            num_workers=self.workers,
            collate_fn=_collate,
            # A GPU copies asynchronously only from pinned memory; on a CPU pinning is an extra copy.
            pin_memory=self.placement.device.type == "cuda",
            # More batches would fill /dev/shm, and help only if the time per batch varies a lot.
            prefetch_factor=BATCHES_PER_WORKER - 1 if self.workers else None,
            persistent_workers=self._persistent and self.workers > 0,
            worker_init_fn=partial(start_worker, os.getpid()),
            # A forked worker is a child of this process, and ends with it.
            multiprocessing_context="fork" if self.workers and sys.platform == "linux" else None,
        )

    def close(self) -> None:
        """End the decoding processes now instead of at the end of the program."""
        del self._loader

    def num_batches(self, epoch: int = 0) -> int:
        """Return the number of batches in a pass."""
        return len(self.plan(epoch))

    def plan(self, epoch: int) -> list[list[int]]:
        """Return the indices of each batch of an epoch."""
        return plan_epoch(len(self.samples), self.batch_size, self.seed if self.shuffle else None, epoch)

    def batches(
        self, epoch: int = 0, start: int = 0, stop: int | None = None, whole: bool = False
    ) -> Iterator[Batch]:
        """Yield the batches of an epoch on the device, from number ``start`` up to ``stop``.

        In distributed training these are this rank's share (:func:`take_share`); ``whole`` yields all
        batches.

        A decoding process that dies is replaced and its batch is made again, with the same content. If
        batches cannot be passed between processes, this process decodes. If the caller waits for batches,
        more processes decode the rest. If ``allow_lost`` is set, a batch may lack images; ``Batch.lost``
        names them.

        Raises:
            DataError: an image can no longer be read, and ``allow_lost`` is not set: nobody would see that
                metrics were computed over fewer images.
            EnvironmentFaultError: decoding processes die repeatedly.
        """
        plan = self.plan(epoch)[start:stop]
        plan = plan if whole else take_share(plan, self.distributed, self.shuffle)
        keys = [[(epoch, index) for index in batch] for batch in plan]
        self.wait_seconds = began = waited_before = 0.0
        done = deaths = 0
        while done < len(keys):
            try:
                for number, batch in enumerate(self._pass(keys[done:])):
                    if number == 0:  # the first batch includes the start of the workers: do not measure it
                        began, waited_before = time.perf_counter(), self.wait_seconds
                    done, deaths = done + 1, 0
                    yield batch
                    is_time = number and number % (BATCHES_BEFORE_GROWTH * max(1, self.workers)) == 0
                    if is_time and done < len(keys) and self._grow(began, waited_before):
                        break  # batches that these workers have prepared beyond this one are made again
            except WorkerResourceError as error:
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
            yield self._to_device(batch)

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

    def _decode_here(self, error: WorkerResourceError) -> None:
        self.warn(
            f"decoding processes cannot hand over their batches ({error}); the training process decodes from "
            f"here on, which is slower ({error.remedy})"
        )
        self.workers = 0
        self._loader = self._build()

    def _to_device(self, batch: Batch) -> Batch:
        device = self.placement.device
        # Change the layout last: on a CPU, arithmetic that also changes it takes three times as long.
        images = self._normalize(batch.images.to(device, non_blocking=True))
        images = images.to(memory_format=self.placement.memory_format)
        return Batch(images, batch.labels.to(device, non_blocking=True), batch.indices, batch.lost)


def _count(workers: int) -> str:
    return f"{workers} process{'' if workers == 1 else 'es'}"


def _lost_error(lost: dict[str, str]) -> DataError:
    found = "; ".join(f"{path} ({reason})" for path, reason in lost.items())
    fix = "Restore or remove the file, and start again."
    return DataError("reading an image that was readable before", found, fix)
