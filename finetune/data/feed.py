"""The interface of batch sources: loaders of decoded images, and of features from a frozen trunk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from finetune.data.dataset import Sample
from finetune.data.loader import Batch, Placement
from finetune.targets import Target


class BatchLoader(Protocol):
    """Batches of some samples, on a device.

    Attributes:
        samples: the samples that a batch's indices refer to, in order.
        batch_size: samples per batch.
        placement: device and memory layout of the batches.
        input_size: (C, H, W) of the images; None where batches hold features.
        target: what the labels are.
        wait_seconds: seconds that the last pass waited for data.
    """

    samples: tuple[Sample, ...]
    batch_size: int
    placement: Placement
    input_size: tuple[int, int, int] | None
    target: Target
    wait_seconds: float

    def num_batches(self, epoch: int = 0) -> int:
        """Return the number of batches in a pass."""
        ...

    def batches(
        self, epoch: int = 0, start: int = 0, stop: int | None = None, whole: bool = False
    ) -> Iterator[Batch]:
        """Yield the batches of an epoch, from number ``start`` up to ``stop``.

        In distributed training these are this rank's share: a slice of every shuffled batch, or every n-th
        batch of an ordered pass. ``whole`` yields all batches complete.
        """
        ...
