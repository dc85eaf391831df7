"""Training on several ranks: each computes the gradient of its share of every batch, all take the same step.

A batch does not depend on the number of ranks: its images, their views and their order come from the seed.
DistributedDataParallel sums the gradients, and each rank weights its loss so that the sum is the gradient of
the whole batch. Everything else that a step depends on (unreadable images, a non-finite loss, a signal) is
exchanged, so that all ranks take the same branch.

::

    share      number of images of this batch on each rank              summed over ranks
    rehearse   forward and backward without communication: does it fit? first two steps, after a halving
    gradient   in microbatches; the last one is summed over ranks       DistributedDataParallel, no_sync
    agree      whether the loss of every rank is finite
    average    running statistics of BatchNorm, weighted by images

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
from finetune.system.memory import release_memory

REHEARSALS = 2
"""First steps that are rehearsed, each before it is made together. When the second one is, the optimizer's
state and the buckets of DistributedDataParallel are in memory."""


@dataclass(frozen=True)
class BatchShare:
    """A rank's share of a batch.

    Attributes:
        batch: this rank's images; it may be empty.
        num_images: number of images of the whole batch, over all ranks.
        factor: factor of this rank's mean loss; DistributedDataParallel divides by the number of ranks.
        lost: reason for each image of the whole batch that could not be read, by path.
    """

    batch: Batch
    num_images: int
    factor: float
    lost: dict[str, str]


def find_share(
    distributed: Distributed, batch: Batch, loss: nn.Module, mixes: bool, least: int
) -> BatchShare:
    """Exchange the number of images, and return this rank's share of a batch.

    Args:
        distributed: ranks of the run.
        batch: this rank's images of the batch; it may be empty.
        loss: loss whose class weights count, unless labels are mixed.
        mixes: whether mixup or cutmix makes soft labels.
        least: smallest microbatch. If unreadable images leave fewer than this, the share is empty.
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
    """A forward function as a module, so that DistributedDataParallel finds its weights."""

    def __init__(self, network: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self._forward = network, forward

    def forward(self, images: Tensor) -> Tensor:
        return self._forward(images)


class Replicas:
    """The forward pass of a network that every rank holds, with gradients summed over ranks.

    Args:
        network: network of this rank; :meth:`connect` gives it the weights of rank 0.
        forward: function from a batch to logits (B, K), using the network.
        distributed: ranks of the run.
    """

    def __init__(
        self, network: nn.Module, forward: Callable[[Tensor], Tensor], distributed: Distributed
    ) -> None:
        self._module, self._distributed = _Forward(network, forward), distributed
        self._connected: DistributedDataParallel | None = None

    def connect(self, has_unused: bool) -> None:
        """Copy the weights of rank 0 to every rank, and sum gradients from now on.

        Args:
            has_unused: whether some trained weights get no gradient on any rank.
        """
        if self._connected is not None:
            return
        release_memory()  # NCCL allocates beside torch
        with self._distributed.translated(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.11 has no replacement yet
            # Statistics are averaged after the step, by average_statistics.
            self._connected = DistributedDataParallel(
                self._module, broadcast_buffers=False, find_unused_parameters=has_unused
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits (B, K)."""
        logits: Tensor = (self._connected or self._module)(images)
        return logits

    def alone(self) -> AbstractContextManager[None]:
        """Do not sum gradients over ranks while the block runs."""
        return nullcontext() if self._connected is None else self._connected.no_sync()


def agree(distributed: Distributed, loss: Tensor, usable: bool) -> tuple[Tensor, bool]:
    """Return the loss of the whole batch, and whether every rank can take the step.

    Args:
        distributed: ranks of the run.
        loss: loss of this rank, multiplied by its share's factor.
        usable: whether loss, gradient and statistics of this rank are finite.
    """
    if distributed.size == 1:
        return loss, usable
    total, obstacles = distributed.sum(loss.item(), float(not usable))
    return loss.new_tensor(total / distributed.size), not obstacles


@torch.no_grad()
def average_statistics(distributed: Distributed, network: nn.Module, num_images: int, total: int) -> None:
    """Replace BatchNorm's running statistics by their mean over ranks, weighted by images.

    All ranks then hold the same statistics, so a checkpoint of rank 0 is complete.

    Args:
        distributed: ranks of the run.
        network: network after a step.
        num_images: images of this rank in the step.
        total: images of all ranks in the step.
    """
    statistics = [] if distributed.size == 1 else list(_find_statistics(network))
    if not statistics:
        return
    flat = torch.cat(statistics) * (num_images / total)
    with distributed.translated():
        dist.all_reduce(flat)
    torch._foreach_copy_(statistics, torch.split(flat, [len(own) for own in statistics]))


def _find_statistics(network: nn.Module) -> Iterator[Tensor]:
    for layer in network.modules():
        if isinstance(layer, _BatchNorm) and layer.training and layer.running_mean is not None:
            assert layer.running_var is not None
            yield from (layer.running_mean, layer.running_var)


def share_weights(network: nn.Module, distributed: Distributed) -> None:
    """Copy weights and buffers of rank 0 to every rank, so that only rank 0 reads the weights' file."""
    if distributed.size > 1:
        state = distributed.share(
            lambda: {name: tensor.cpu() for name, tensor in network.state_dict().items()}
        )
        network.load_state_dict(state)


def synchronize_batch_norm(network: nn.Module) -> None:
    """Replace every BatchNorm inside by torch's SyncBatchNorm (GPUs only).

    A forward pass in train mode then communicates, so all ranks must run it together.
    """
    convert_sync_batchnorm(network)


def waits_in_forward(network: nn.Module) -> bool:
    """Return whether the network's forward pass communicates between ranks: a SyncBatchNorm in train mode."""
    return any(isinstance(layer, nn.SyncBatchNorm) and layer.training for layer in network.modules())
