"""``torch.compile`` for the forward pass of training, as an option.

One graph for every shape, and none for shapes in general: which graph a batch meets must not depend on the
batches before it, or a run that was interrupted would end in other bits. Random numbers are eager torch's, so
that dropout draws what it draws without compiling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from finetune.display import Display
from finetune.errors import EnvironmentFaultError
from finetune.memory import is_out_of_memory
from finetune.training.task import Task


def build_forward(task: Task, compiled: bool, display: Display) -> Callable[[Tensor], Tensor]:
    """Return what makes logits of a training batch: network or rest, compiled where that was asked for."""
    if not compiled:
        return task.forward(task.network)
    if task.split is not None:
        display.say("training.compile: what learns under the cut is small, and is not compiled")
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
            said = " ".join(str(error).split())[:200] or type(error).__name__
        fix = "Install a C++ compiler (g++), or set training.compile to false."
        raise EnvironmentFaultError("training.compile=true", f"torch cannot compile it: {said}", fix)


def _is_of_compiling(error: Exception) -> bool:
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
