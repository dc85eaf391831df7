"""Batches of kept rows, as training takes them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from finetune.data.loader import Batch, Placement, plan_epoch, take_share
from finetune.data.sample import Sample
from finetune.features.rows import Rows
from finetune.world import SINGLE, World


class RowLoader:
    """Batches of kept rows: a :class:`finetune.data.feed.Feed` whose images are rows (B, D).

    Args:
        views: rows (N, D) of each view; epoch by epoch the next one is taken.
        samples: their pictures.
        batch_size: rows a batch.
        placement: device of the batches.
        seed: of the order.
        shuffle: a new order every epoch; otherwise that of ``samples``.
        world: processes that share the batches.
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
        world: World = SINGLE,
    ) -> None:
        self.views, self.samples = tuple(views), tuple(samples)
        self.batch_size, self.placement = batch_size, placement
        self.seed, self.shuffle, self.world = seed, shuffle, world
        self.wait_seconds = 0.0
        self.input_size: tuple[int, int, int] | None = None
        self._labels = torch.tensor([sample.label for sample in self.samples])

    def num_batches(self, epoch: int = 0) -> int:
        """Return how many batches a pass has."""
        return len(self._plan(epoch))

    def batches(
        self, epoch: int = 0, start: int = 0, stop: int | None = None, whole: bool = False
    ) -> Iterator[Batch]:
        """Yield the batches of an epoch on the device, from number ``start`` up to ``stop``."""
        rows = self.views[epoch % len(self.views)]
        self.wait_seconds = 0.0
        plan = self._plan(epoch)[start:stop]
        for batch in plan if whole else take_share(plan, self.world, self.shuffle):
            began = time.perf_counter()
            indices = torch.tensor(batch, dtype=torch.int64)
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
