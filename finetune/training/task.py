"""What is trained on what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune.data.feed import BatchLoader
from finetune.errors import EnvironmentFaultError
from finetune.system.device import compute_chunk_size, is_out_of_memory
from finetune.system.display import Display
from finetune.training.freeze import set_train_mode
from finetune.training.plan import Plan
from pretrained.graph.split import SplitNetwork


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
    train: BatchLoader
    val: BatchLoader
    num_classes: int
    split: SplitNetwork | None = None

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
    size = compute_chunk_size(*feed.input_size[1:])
    return size if size < feed.batch_size else 0


def _drops(module: nn.Module) -> bool:
    rates = (getattr(module, name, 0) for name in _RATES)
    return any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)


# --- ``torch.compile`` for the forward pass of training, as an option ---
#
# Each shape gets a graph of its own, without dynamic shapes: which graph a batch runs must not depend on
# earlier batches, or a resumed run would end in other bits. Random numbers come from eager torch, so that
# dropout draws the same masks as without compiling.


def build_forward(task: Task, compiled: bool, display: Display) -> Callable[[Tensor], Tensor]:
    """Return what makes logits of a training batch: network or rest, compiled where that was asked for."""
    if not compiled:
        return task.forward(task.network)
    if task.split is not None:
        display.say("training.compile: the layers above the cut are few and are not compiled")
        return task.forward(task.network)
    display.say("training.compile: the first steps compile the network, which takes a minute or more")
    return Compiled(task.network)


class Compiled:
    """A network whose forward is compiled when it is first called.

    Args:
        network: (B, 3, H, W) -> (B, K); its weights, modes and hooks stay its own.
        backend: of ``torch.compile``.
    """

    def __init__(self, network: nn.Module, backend: str = "inductor") -> None:
        # Features are standardised by a hook; without guards a graph from before it was there would be taken.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        # Beyond the limit torch goes on without compiling, and which shapes those are depends on history.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        options: dict[str, Any] | None = {"fallback_random": True} if backend == "inductor" else None
        self._forward: Callable[[Tensor], Tensor] = torch.compile(
            network, backend=backend, dynamic=False, options=options
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits.

        Raises:
            EnvironmentFaultError: the machine lacks a compiler, or torch cannot compile this network.
        """
        try:
            return self._forward(images)
        except Exception as error:
            if is_out_of_memory(error) or not _is_of_compiling(error):
                raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
        fix = "Install a C++ compiler (g++), or set training.compile to false."
        raise EnvironmentFaultError(
            "training.compile=true", f"torch cannot compile the network: {reason}", fix
        )


def _is_of_compiling(error: Exception) -> bool:
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
