"""Trial steps on the device: the largest batch size that fits, and operations that cannot be deterministic.

A trial holds what training holds beside the activations: the optimizer's state, the moving average of the
weights and, with several ranks, the buckets in which gradients are summed.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from finetune.data.loader import Batch, Placement
from finetune.recipe import ResolvedTraining
from finetune.system.memory import attempt, release_memory, reset_peak_memory
from finetune.targets import build_loss
from finetune.training.freeze import build_param_groups, freeze, set_train_mode
from finetune.training.optim import build_optimizer
from finetune.training.plan import Plan
from finetune.training.step import Gradient, min_microbatch, takes_single_images

HEADROOM = 1.1
"""Factor of the tried number of images over the one returned: for fragmentation, for the next batch, which is
already on its way, and for what NCCL allocates. Not measured on a GPU."""


def find_batch_size(fits: Callable[[int], bool], wanted: int, least: int = 1) -> int:
    """Return the largest of ``wanted``, its half, its quarter ... that fits; ``least`` if none does."""
    size = wanted
    while size > least and not fits(size):
        size = max(least, size // 2)
    return size


class StepTrial:
    """Trial steps of a training on its device. Weights, buffers and modes are the same afterwards.

    Args:
        network: network on its device.
        plan: which stages learn.
        input_size: (C, H, W) of the images.
        placement: device and layout of the images.
        settings: section ``training`` of the recipe.
        num_ranks: number of processes that share a batch.
    """

    def __init__(
        self,
        network: nn.Module,
        plan: Plan,
        input_size: tuple[int, int, int],
        placement: Placement,
        settings: ResolvedTraining,
        num_ranks: int = 1,
    ) -> None:
        self.network, self.plan, self.input_size = network, plan, input_size
        self.placement, self.settings, self.num_ranks = placement, settings, num_ranks

    def find_batch_size(self) -> int:
        """Return the largest batch size, up to the recipe's, whose share of one rank fits on the device."""
        with self._prepared():
            return find_batch_size(self._fits, self.settings.batch_size, min_microbatch(self.network))

    def run_smallest(self) -> None:
        """Run a step with as few images as possible; memory that runs out is left to the training.

        Raises:
            RuntimeError: torch is to be deterministic, and has no such implementation of an operation.
        """
        with self._prepared():
            attempt(partial(self._run, min_microbatch(self.network)))

    def time_step(self, most_images: int = 16) -> float:
        """Return the seconds per image of a training step, measured after a first step."""
        num_images = max(min(self.settings.batch_size, most_images), min_microbatch(self.network))
        with self._prepared(), torch.random.fork_rng(devices=[]):
            self._run(num_images)
            return self._run(num_images) / num_images

    def takes_single_images(self) -> bool:
        """Return whether one image can be trained on: not if a BatchNorm in train mode gets 1x1 features."""
        with self._prepared(), torch.random.fork_rng(devices=[]):
            image = torch.zeros(1, *self.input_size, device=self.placement.device)
            return takes_single_images(self.network, image)

    def _fits(self, batch_size: int) -> bool:
        own = math.ceil(batch_size / self.num_ranks)
        return not isinstance(attempt(partial(self._run, math.ceil(own * HEADROOM))), str)

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        network = self.network
        modes = {module: module.training for module in network.modules()}
        buffers = [buffer.clone() for buffer in network.buffers()]
        freeze(network, self.plan)
        set_train_mode(network, self.plan)
        try:
            yield
        finally:
            network.zero_grad(set_to_none=True)
            release_memory()
            for buffer, before in zip(network.buffers(), buffers, strict=True):
                buffer.data.copy_(before)
            for module, mode in modes.items():
                module.training = mode
            reset_peak_memory(self.placement.device)

    def _run(self, num_images: int) -> float:
        """Compute a gradient beside everything else that training holds; return the seconds of it."""
        device, settings = self.placement.device, self.settings
        held = [*self._allocate_state(), copy.deepcopy(self.network) if settings.ema_decay else None]
        images = torch.zeros(num_images, *self.input_size, device=device)
        images = images.to(memory_format=self.placement.memory_format)
        labels = torch.zeros(num_images, dtype=torch.int64, device=device)
        scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "float16")
        gradient = Gradient(self.network, build_loss(), None, scaler, settings.precision)
        began = time.perf_counter()
        try:
            gradient.compute(Batch(images, labels, labels, {}), settings.microbatch or 0)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter() - began
        finally:
            self.network.zero_grad(set_to_none=True)
            held.clear()

    def _allocate_state(self) -> list[object]:
        """Return the optimizer with its state and, with several ranks, buckets of gradients.

        Its step with gradients, decay and lr of 0 allocates the state, and changes no weight by a bit.
        """
        groups = [group | {"lr": 0.0} for group in build_param_groups(self.network, self.plan, 0.0)]
        optimizer = build_optimizer(groups, self.settings)
        weights: list[Tensor] = [weight for group in groups for weight in group["params"]]
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return [optimizer, *(torch.empty_like(weight) for weight in weights if self.num_ranks > 1)]
