"""Predictions: the logits of a network over a data loader, in the loader's order.

Shape legend: N images, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor, nn

from finetune.data.feed import BatchLoader
from finetune.system.device import Precision, compute_chunk_size
from finetune.system.distributed import SINGLE_PROCESS, Distributed
from finetune.system.forward import ChunkedForward, autocast
from finetune.targets import SINGLE, Target, decide


@dataclass(frozen=True)
class Predictions:
    """The logits of a network for some images, with their labels.

    Attributes:
        logits: (N, K) float32, on the CPU; the outputs, whatever they mean.
        labels: (N,) int64, the true classes; or as :meth:`finetune.targets.Target.encode` gives them.
        target: what the labels are.
    """

    logits: Tensor
    labels: Tensor
    target: Target = SINGLE

    @property
    def probabilities(self) -> Tensor:
        """The probability of each class, (N, K); of numbers, the values in their own unit."""
        return self.target.activate(self.logits)

    def apply_temperature(self, temperature: float) -> Predictions:
        """Return these predictions with logits divided by a temperature."""
        return replace(self, logits=self.logits / temperature)

    @property
    def predicted(self) -> Tensor:
        """The most probable class of each image, (N,) int64."""
        return decide(self.logits)

    @property
    def accuracy(self) -> float:
        """Share of images whose most probable class is their label, in [0, 1]."""
        return (self.predicted == self.labels).double().mean().item()

    @property
    def score(self) -> float:
        """The metric that chooses the best epoch (:attr:`finetune.targets.Target.score`)."""
        return self.target.compute_score(self.logits, self.labels)

    @property
    def loss(self) -> float:
        """Mean loss over images, without label smoothing and class weights."""
        return self.target.compute_monitored(self.logits, self.labels)["loss"]


def predict(
    network: nn.Module,
    feed: BatchLoader,
    precision: Precision,
    on_batch: Callable[[int], None] | None = None,
    forward: Callable[[Tensor], Tensor] | None = None,
    distributed: Distributed = SINGLE_PROCESS,
) -> Predictions:
    """Run a network in eval mode over a data loader; every module gets its previous mode back.

    Several ranks take batches in turns, and each returns the predictions of all images.

    Args:
        network: a network (B, 3, H, W) -> (B, K).
        feed: an unshuffled loader.
        precision: the precision of the forward pass; logits are returned as float32.
        on_batch: called with the number of images of each batch, equally often on all ranks.
        forward: computes the logits of a batch if the loader gives features instead of images; None for the
            network itself.
        distributed: ranks that share the loader.
    """
    modes = {module: module.training for module in network.modules()}
    network.eval()
    chunked = ChunkedForward(forward or network, _chunk_size(feed))
    found: list[tuple[Tensor, Tensor]] = []
    num_fetched = held = 0
    try:
        with torch.inference_mode(), autocast(feed.placement.device, precision):
            for batch in feed.batches():
                found.append((chunked(batch.images).float(), batch.labels))
                held += found[-1][0].nbytes
                if held >= HELD_BYTES:
                    found[num_fetched:] = _fetch(found[num_fetched:])
                    num_fetched, held = len(found), 0
                if on_batch is not None:
                    on_batch(len(batch.labels))
            if on_batch is not None and len(found) * distributed.size < feed.num_batches():
                on_batch(0)  # other ranks have one more batch
    finally:
        for module, mode in modes.items():
            module.training = mode
    found[num_fetched:] = _fetch(found[num_fetched:])
    logits, labels = zip(*_gather(found, distributed), strict=True)
    return Predictions(torch.cat(logits), torch.cat(labels), feed.target)


HELD_BYTES = 64 * 2**20
"""Logits that a GPU holds before they go to the CPU. Fetched by the batch, each would wait for the GPU."""


def _fetch(batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Return logits and labels on the CPU."""
    return [(logits.cpu(), labels.cpu()) for logits, labels in batches]


def _gather(own: list[tuple[Tensor, Tensor]], distributed: Distributed) -> list[tuple[Tensor, Tensor]]:
    """Return logits and labels of all batches, in order."""
    if distributed.size == 1:
        return own
    turns = zip_longest(*distributed.collect(own))
    return [batch for turn in turns for batch in turn if batch is not None]


def _chunk_size(feed: BatchLoader) -> int:
    """Return the images per forward pass: on a CPU, as many as fit its caches; 0 for no limit."""
    if feed.placement.device.type != "cpu" or feed.input_size is None:
        return 0
    return compute_chunk_size(*feed.input_size[1:])


METRICS_TOLERANCE: dict[Precision, float] = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.25}
"""Largest accepted difference between a probability in predictions.csv and that of the saved model. In half
precision and with other batch sizes, a logit of 50 may differ by 0.2."""

GPU_TOLERANCE = 0.02
"""Smallest such tolerance on a GPU, where some kernels multiply float32 with reduced precision."""
