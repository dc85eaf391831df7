"""One training in several processes: each learns from its part of every batch, all take the same step.

A batch is the same whatever the number of processes: its images, their views and their order come from the
seed. Each process takes its share, torch's DistributedDataParallel adds up the gradients, and every process
weighs its loss so that the sum is the gradient of the whole batch. What a step depends on beside the
gradient (images that were lost, a loss that is no number, a signal) is agreed on: no process goes another
way.

::

    counted    who has how many images of this batch           sums over all processes
    rehearse   forward and backward alone: is there memory?      at first, and after each halving
    gradient   in parts; the last one adds up over processes     DistributedDataParallel, no_sync
    agree      is every loss a number?
    average    running statistics of BatchNorm, by images

Shape legend: B batch, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from finetune.data.loader import Batch
from finetune.system.distributed import Distributed

REHEARSALS = 2
"""Steps whose memory is tried before processes wait for each other: the second has the optimiser's state."""


@dataclass(frozen=True)
class BatchShare:
    """A process's share of a batch.

    Attributes:
        batch: what the process learns from; none is possible.
        num_images: of the whole batch.
        factor: what the process's mean loss is multiplied by; DistributedDataParallel divides by the size.
        lost: why, for each image of the whole batch that could not be read.
    """

    batch: Batch
    num_images: int
    factor: float
    lost: dict[str, str]


def find_share(
    distributed: Distributed, batch: Batch, loss: nn.Module, mixes: bool, least: int
) -> BatchShare:
    """Return a process's share of a batch, as all processes know it.

    Args:
        distributed: the processes.
        batch: this process's images of it; none is possible.
        loss: whose class weights count, unless labels are mixed.
        mixes: labels become soft.
        least: images that may go through the network at a time. Where some were lost, fewer may be left;
            then none of them is learnt from.
    """
    if distributed.size == 1:
        return BatchShare(batch, len(batch.labels), 1.0, batch.lost)
    if batch.lost and len(batch.labels) < least:
        batch = Batch(batch.images[:0], batch.labels[:0], batch.indices[:0], batch.lost)
    number = len(batch.labels)
    weights = None if mixes else getattr(loss, "weight", None)
    own = float(number) if weights is None else weights[batch.labels].double().sum().item()
    images, whole, num_lost = distributed.sum(number, own, len(batch.lost))
    lost: dict[str, str] = {}
    for some in distributed.collect(batch.lost) if num_lost else ():
        lost |= some
    return BatchShare(batch, int(images), own / whole * distributed.size if whole else 0.0, lost)


class _Forward(nn.Module):
    """A forward as a module, so that DistributedDataParallel finds the weights behind it."""

    def __init__(self, network: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self._forward = network, forward

    def forward(self, images: Tensor) -> Tensor:
        return self._forward(images)


class Replicas:
    """The forward of a network that every process has, and the gradient of all of them.

    Args:
        network: its weights are those of the main process from :meth:`connect` on.
        forward: what makes logits of a batch with it.
        distributed: the processes.
    """

    def __init__(
        self, network: nn.Module, forward: Callable[[Tensor], Tensor], distributed: Distributed
    ) -> None:
        self._module, self._world = _Forward(network, forward), distributed
        self._connected: DistributedDataParallel | None = None

    def connect(self, has_unused: bool) -> None:
        """Give every process the main one's weights, and add up gradients from now on.

        Args:
            has_unused: some learnable weights have no part in the loss, in any process.
        """
        if self._connected is not None:
            return
        with self._world.translated(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.11 has no other word for it
            # Statistics are averaged after the step, where every process goes by.
            self._connected = DistributedDataParallel(
                self._module, broadcast_buffers=False, find_unused_parameters=has_unused
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits (B, K)."""
        logits: Tensor = (self._connected or self._module)(images)
        return logits

    def alone(self) -> AbstractContextManager[None]:
        """Keep the gradient to this process while the block runs."""
        return nullcontext() if self._connected is None else self._connected.no_sync()


def agree(distributed: Distributed, loss: Tensor, usable: bool) -> tuple[Tensor, bool]:
    """Return the loss of the whole batch, and whether the step can be made in every process.

    Args:
        distributed: the processes.
        loss: of this one, weighed by its share's factor.
        usable: loss, gradient and statistics of this process are finite.
    """
    if distributed.size == 1:
        return loss, usable
    total, obstacles = distributed.sum(loss.item(), float(not usable))
    return loss.new_tensor(total / distributed.size), not obstacles


@torch.no_grad()
def average_statistics(distributed: Distributed, network: nn.Module, num_images: int, total: int) -> None:
    """Replace BatchNorm's running statistics by their mean over processes, weighted by images.

    Every process goes on with the same ones, and a checkpoint of one holds those of all.

    Args:
        distributed: the processes.
        network: after a step.
        num_images: of this process in the step.
        total: of all processes.
    """
    statistics = [] if distributed.size == 1 else list(_find_statistics(network))
    if not statistics:
        return
    flat = torch.cat(statistics) * (num_images / total)
    with distributed.translated():
        dist.all_reduce(flat)
    for one, mean in zip(statistics, torch.split(flat, [len(one) for one in statistics]), strict=True):
        one.copy_(mean)


def _find_statistics(network: nn.Module) -> Iterator[Tensor]:
    for layer in network.modules():
        if isinstance(layer, _BatchNorm) and layer.training and layer.running_mean is not None:
            assert layer.running_var is not None
            yield from (layer.running_mean, layer.running_var)


def share_weights(network: nn.Module, distributed: Distributed) -> None:
    """Give every process the main one's weights and statistics; they need no file of their own."""
    if distributed.size > 1:
        state = distributed.share(
            lambda: {name: tensor.cpu() for name, tensor in network.state_dict().items()}
        )
        network.load_state_dict(state)


def synchronize_batch_norm(network: nn.Module) -> None:
    """Let every BatchNorm inside see the batch of all processes (torch's SyncBatchNorm; on GPUs only).

    From then on a forward in train mode is a step that all take together.
    """
    convert_sync_batchnorm(network)


def waits_in_forward(network: nn.Module) -> bool:
    """Return whether processes wait for each other while images go through a network in train mode."""
    return any(isinstance(layer, nn.SyncBatchNorm) for layer in network.modules())
