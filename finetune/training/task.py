"""What is trained on what."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from finetune.data.loader import Loader
from finetune.strategy.matrix import Plan


@dataclass(frozen=True)
class Task:
    """A network, what of it learns, and from which images.

    Attributes:
        network: on its device, (B, 3, H, W) -> (B, K).
        plan: what learns, and how fast.
        loss: of (logits, labels or soft labels).
        train: shuffled training batches.
        val: validation batches, in order.
        num_classes: K.
    """

    network: nn.Module
    plan: Plan
    loss: nn.Module
    train: Loader
    val: Loader
    num_classes: int
