"""What is trained on what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune.data.feed import Feed
from finetune.runtime import compute_part_size
from finetune.strategy.freeze import set_train_mode
from finetune.strategy.matrix import Plan
from pretrained.graph.split import Split


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


_RATES = ("p", "drop_prob", "drop_rate", "drop_path_rate", "dropout", "attn_drop")
"""Names under which modules of torch, torchvision and timm hold the rate of a dropout."""


def choose_microbatch(task: Task) -> int:
    """Return how many images go through the network at a time, where the recipe leaves it open; 0 is all.

    On a CPU, as many as fit its caches, where parts of a batch give the gradient of the whole: BatchNorm
    would see other batches, and dropout would draw other masks. Kept features stay whole.
    """
    feed = task.train
    if feed.input_size is None or feed.placement.device.type != "cpu":
        return 0
    set_train_mode(task.network, task.plan)
    at_work = [module for module in task.network.modules() if module.training]
    if any(isinstance(module, _BatchNorm) or _drops(module) for module in at_work):
        return 0
    size = compute_part_size(*feed.input_size[1:])
    return size if size < feed.batch_size else 0


def _drops(module: nn.Module) -> bool:
    rates = (getattr(module, name, 0) for name in _RATES)
    return any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)
