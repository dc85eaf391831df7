"""Batches on a device, whose content is a function of (seed, epoch, position) alone.

Neither the number of workers nor what was loaded before changes a single pixel: the order of an epoch
comes from (seed, epoch), and the random view of a picture from (seed, epoch, its index). So an
interrupted epoch can go on at any batch without replaying the ones before.

Shape legend: B batch, H W pixels.
"""

from __future__ import annotations

import os
import signal
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
from finetune.errors import DataError
from finetune.runtime import derive_seed, seed_everything

Key = tuple[int, int]
"""(epoch, index into the samples). The epoch travels with the index, so that workers hold no state."""


class Batch(NamedTuple):
    """Some pictures: images (B, 3, H, W) float32, labels (B,) int64, indices (B,) into the samples."""

    images: Tensor
    labels: Tensor
    indices: Tensor


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


class _Pictures(TorchDataset[Any]):
    """Decodes and transforms one picture; a picture that fails becomes a sentence, not an exception."""

    def __init__(self, dataset: Dataset, samples: Sequence[Sample], transform: Transform, seed: int) -> None:
        self.dataset, self.samples, self.transform, self.seed = dataset, samples, transform, seed

    def __getitem__(self, key: Key) -> tuple[Tensor, int, int] | str:
        epoch, index = key
        sample = self.samples[index]
        try:
            image = decode_image(self.dataset.file(sample))
        except BadImageError as error:
            return f"{sample.path} ({error.reason})"
        seed_everything(self.seed, "view", epoch, index)
        return self.transform(image), sample.label, index


def _collate(items: list[tuple[Tensor, int, int] | str]) -> Batch | list[str]:
    failures = [item for item in items if isinstance(item, str)]
    if failures:
        return failures
    images, labels, indices = zip(*items, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), torch.tensor(indices))


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
    systems send their signals. They end when the loader says so, or when their parent is gone.
    """
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
        self._batches = _Batches()
        self._loader: DataLoader[Any] = DataLoader(
            _Pictures(dataset, self.samples, transform, seed),
            batch_sampler=self._batches,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=placement.device.type == "cuda",
            # Evaluation's processes end with each pass: those of two loaders would share cores and /dev/shm.
            persistent_workers=shuffle and workers > 0,
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

        Raises:
            DataError: a picture cannot be read (it could when the run began).
        """
        self._batches.keys = [[(epoch, index) for index in batch] for batch in self.plan(epoch)[start:stop]]
        self.wait_seconds = 0.0
        iterator = iter(self._loader)
        while True:
            began = time.perf_counter()
            batch = next(iterator, None)
            self.wait_seconds += time.perf_counter() - began
            if batch is None:
                return
            yield self._place(_check(batch))

    def _place(self, batch: Batch) -> Batch:
        device = self.placement.device
        layout = torch.channels_last if self.placement.channels_last else torch.contiguous_format
        images = batch.images.to(device, non_blocking=True, memory_format=layout)
        return Batch(images, batch.labels.to(device, non_blocking=True), batch.indices)


def _check(batch: Batch | list[str]) -> Batch:
    if isinstance(batch, Batch):
        return batch
    fix = "Restore or remove the file, and start again."
    raise DataError("reading an image that was readable before", "; ".join(batch), fix)
