"""What is trained on what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from finetune.data.feed import Feed
from finetune.strategy.matrix import Plan
from pretrained.split import Split


@dataclass(frozen=True)
class Task:
    """A network, what of it learns, and from which images or kept features.

    Attributes:
        network: on its device, (B, 3, H, W) -> (B, K).
        plan: what learns, and how fast.
        loss: of (logits, labels or soft labels).
        train: shuffled training batches.
        val: validation batches, in order.
        num_classes: K.
        split: the network in two parts, where batches hold what the trunk gave.
    """

    network: nn.Module
    plan: Plan
    loss: nn.Module
    train: Feed
    val: Feed
    num_classes: int
    split: Split | None = None

    def forward(self, network: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return what makes logits (B, K) of a batch: the network, or of a cut one the rest."""
        return network if self.split is None else self.split.rest(network)
