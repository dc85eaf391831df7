"""Where batches come from: decoded images, or what a frozen trunk made of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from finetune.data.dataset import Sample
from finetune.data.loader import Batch, Placement


class BatchLoader(Protocol):
    """Batches of some samples, on a device.

    Attributes:
        samples: in the order that a batch's indices count.
        batch_size: samples a batch.
        placement: where batches go.
        input_size: (C, H, W) of the images; None where batches hold features.
        wait_seconds: time the last pass spent waiting for data.
    """

    samples: tuple[Sample, ...]
    batch_size: int
    placement: Placement
    input_size: tuple[int, int, int] | None
    wait_seconds: float

    def num_batches(self, epoch: int = 0) -> int:
        """Return how many batches a pass has."""
        ...

    def batches(
        self, epoch: int = 0, start: int = 0, stop: int | None = None, whole: bool = False
    ) -> Iterator[Batch]:
        """Yield the batches of an epoch, from number ``start`` up to ``stop``.

        Among several processes they are this one's: its part of every batch to learn from, or its turns of
        those that are in order. ``whole`` gives all of all.
        """
        ...
