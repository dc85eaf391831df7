"""The largest batch size that fits on a GPU, up to a wanted one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from finetune.data.loader import Batch, Placement
from finetune.system.device import Precision
from finetune.system.memory import is_out_of_memory, release_memory
from finetune.targets import build_loss
from finetune.training.freeze import freeze, set_train_mode
from finetune.training.plan import Plan
from finetune.training.step import Gradient, min_microbatch

HEADROOM = 1.25
"""Factor of the tried batch size over the one returned, for optimizer state and fragmentation."""


def find_batch_size(fits: Callable[[int], bool], wanted: int, least: int = 1) -> int:
    """Return the largest of ``wanted``, its half, its quarter ... that fits; ``least`` if none does."""
    size = wanted
    while size > least and not fits(size):
        size = max(least, size // 2)
    return size


def fit_batch_size(
    network: nn.Module, plan: Plan, input_size: tuple[int, int, int], placement: Placement, wanted: int
) -> int:
    """Try steps on the device, and return the largest batch size up to ``wanted`` that fits.

    Args:
        network: network on its device; weights, modes and buffers are restored.
        plan: which stages learn.
        input_size: (C, H, W) of the images.
        placement: device and layout of the images.
        wanted: largest batch size to try.
    """
    modes = {module: module.training for module in network.modules()}
    buffers = [buffer.clone() for buffer in network.buffers()]
    freeze(network, plan)
    set_train_mode(network, plan)
    try:
        return find_batch_size(
            lambda size: _fits(network, input_size, placement, round(size * HEADROOM)),
            wanted,
            min_microbatch(network),
        )
    finally:
        network.zero_grad(set_to_none=True)
        release_memory()
        for buffer, before in zip(network.buffers(), buffers, strict=True):
            buffer.data.copy_(before)
        for module, mode in modes.items():
            module.training = mode


def _fits(network: nn.Module, input_size: tuple[int, int, int], placement: Placement, size: int) -> bool:
    precision: Precision = "float32"  # the most that any precision needs
    layout = torch.channels_last if placement.channels_last else torch.contiguous_format
    scaler = torch.amp.GradScaler(placement.device.type, enabled=False)
    try:
        images = torch.zeros(size, *input_size, device=placement.device).to(memory_format=layout)
        labels = torch.zeros(size, dtype=torch.int64, device=placement.device)
        batch = Batch(images, labels, labels, {})
        Gradient(network, build_loss(), None, scaler, precision).compute(batch)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        network.zero_grad(set_to_none=True)
        release_memory()
    return True
