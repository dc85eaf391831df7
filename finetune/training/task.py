"""What a trainer gets: network, plan, loss and data; and the forward pass that it trains with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune.data.feed import BatchLoader
from finetune.system.compiler import compile_error, is_compile_error
from finetune.system.device import compute_chunk_size
from finetune.system.display import Display
from finetune.system.memory import is_out_of_memory
from finetune.training.freeze import set_train_mode
from finetune.training.plan import Plan
from pretrained.graph.cut_network import CutNetwork


@dataclass(frozen=True)
class Task:
    """A network, its plan, and the images or cached features it is trained on.

    Attributes:
        network: network on its device, (B, 3, H, W) -> (B, K).
        plan: which stages learn, with which lr.
        loss: function of logits (B, K) and labels (B,) or soft labels (B, K).
        train: training batches, shuffled.
        val: validation batches, in order.
        num_classes: number of classes, K.
        cut_network: the network cut into trunk and rest, if batches hold the trunk's output; else None.
    """

    network: nn.Module
    plan: Plan
    loss: nn.Module
    train: BatchLoader
    val: BatchLoader
    num_classes: int
    cut_network: CutNetwork | None = None

    def forward(self, network: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return the function from a batch to logits (B, K): the network, or the rest of a cut one."""
        return network if self.cut_network is None else self.cut_network.rest(network)


_DROPOUT_NAMES = ("p", "drop_prob", "drop_rate", "drop_path_rate", "dropout", "attn_drop")
"""Attributes in which modules of torch, torchvision and timm hold a dropout probability."""


def choose_microbatch(task: Task) -> int:
    """Return the microbatch where the recipe does not set it; 0 is the whole batch.

    On a CPU it is as many images as fit the processor's caches. With BatchNorm in train mode or dropout the
    batch stays whole, since microbatches would change the result; so does a batch of cached features.
    """
    loader = task.train
    if loader.input_size is None or loader.placement.device.type != "cpu":
        return 0
    set_train_mode(task.network, task.plan)
    in_train_mode = [module for module in task.network.modules() if module.training]
    if any(isinstance(module, _BatchNorm) or _drops(module) for module in in_train_mode):
        return 0
    size = compute_chunk_size(*loader.input_size[1:])
    return size if size < loader.batch_size else 0


def _drops(module: nn.Module) -> bool:
    rates = (getattr(module, name, 0) for name in _DROPOUT_NAMES)
    return any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)


# --- The forward pass, optionally compiled ---
#
# Dynamic shapes are off: the graph that a batch runs must not depend on earlier batches, or a resumed run
# would give other bits. Random numbers come from eager torch, so dropout masks stay the same.


def build_forward(task: Task, compiled: bool, display: Display) -> Callable[[Tensor], Tensor]:
    """Return the function from a training batch to logits, compiled if asked for."""
    if not compiled:
        return task.forward(task.network)
    if task.cut_network is not None:
        display.say("training.compile: the layers above the cut are few and are not compiled")
        return task.forward(task.network)
    display.say("training.compile: the first steps compile the network, which takes a minute or more")
    return Compiled(task.network)


class Compiled:
    """A network whose forward pass is compiled at the first call.

    Args:
        network: network, (B, 3, H, W) -> (B, K); it shares its weights, modes and hooks.
        backend: backend of ``torch.compile``.
    """

    def __init__(self, network: nn.Module, backend: str = "inductor") -> None:
        # A hook standardises features; without guards a graph compiled before that hook would be reused.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        # Beyond the limit torch stops compiling, so what is compiled would depend on earlier batches.
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
            if is_out_of_memory(error) or not is_compile_error(error):
                raise
            refusal = compile_error(error)
        raise refusal
