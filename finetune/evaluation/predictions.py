"""Predictions: logits of a network over a feed, in the feed's order.

Shape legend: N images, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor, nn

from finetune import targets
from finetune.data.feed import BatchLoader
from finetune.system.device import Precision, compute_chunk_size
from finetune.system.distributed import SINGLE_PROCESS, Distributed
from finetune.system.forward import ChunkedForward, autocast


@dataclass(frozen=True)
class Predictions:
    """What a network says of some images.

    Attributes:
        logits: (N, K) float32, on the CPU.
        labels: (N,) int64, the true classes.
    """

    logits: Tensor
    labels: Tensor

    @property
    def probabilities(self) -> Tensor:
        """Of each class, (N, K)."""
        return targets.to_probabilities(self.logits)

    def soften(self, temperature: float) -> Predictions:
        """Return the same with logits divided by a temperature."""
        return Predictions(self.logits / temperature, self.labels)

    @property
    def predicted(self) -> Tensor:
        """The likeliest class of each image, (N,)."""
        return targets.decide(self.logits)

    @property
    def accuracy(self) -> float:
        """Share of images whose likeliest class is right, in [0, 1]."""
        return (self.predicted == self.labels).double().mean().item()

    @property
    def loss(self) -> float:
        """Mean over images in nats, without smoothing and class weights."""
        return targets.compute_mean_loss(self.logits, self.labels)


def predict(
    network: nn.Module,
    feed: BatchLoader,
    precision: Precision,
    on_batch: Callable[[int], None] | None = None,
    forward: Callable[[Tensor], Tensor] | None = None,
    distributed: Distributed = SINGLE_PROCESS,
) -> Predictions:
    """Run a network in eval mode over a feed, and leave every module in the mode it had.

    Several processes take batches in turns, and all get the predictions of all: each image counts once.

    Args:
        network: (B, 3, H, W) -> (B, K).
        feed: unshuffled.
        precision: of the forward pass; logits come back in float32.
        on_batch: told how many images each batch had; equally often in all processes.
        forward: what makes logits of a batch, where that is not the network itself but its rest under a cut.
        distributed: processes that share the feed.
    """
    modes = {module: module.training for module in network.modules()}
    network.eval()
    chunked = ChunkedForward(forward or network, _most(feed))
    found: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.inference_mode(), autocast(feed.placement.device, precision):
            for batch in feed.batches():
                found.append((chunked(batch.images).float(), batch.labels))
                if on_batch is not None:
                    on_batch(len(batch.labels))
            if on_batch is not None and len(found) * distributed.size < feed.num_batches():
                on_batch(0)  # the others have one more
    finally:
        for module, mode in modes.items():
            module.training = mode
    logits, labels = zip(*_gather(found, distributed), strict=True)
    return Predictions(torch.cat(logits).cpu(), torch.cat(labels).cpu())


def _gather(own: list[tuple[Tensor, Tensor]], distributed: Distributed) -> list[tuple[Tensor, Tensor]]:
    """Return logits and labels of all batches, in order."""
    if distributed.size == 1:
        return own
    turns = zip_longest(*distributed.collect([(logits.cpu(), labels.cpu()) for logits, labels in own]))
    return [one for turn in turns for one in turn if one is not None]


def _most(feed: BatchLoader) -> int:
    """Images go through a CPU in parts that fit its caches; kept features as they come."""
    if feed.placement.device.type != "cpu" or feed.input_size is None:
        return 0
    return compute_chunk_size(*feed.input_size[1:])


FIGURES_TOLERANCE: dict[Precision, float] = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.25}
"""Largest difference in a probability between figures and model. Where numbers are coarse, and a trunk saw
its images in other batches, a logit of 50 may differ by 0.2."""


GPU_TOLERANCE = 0.02
"""The least of it on a GPU, which multiplies float32 with fewer bits in some kernels than in others."""
