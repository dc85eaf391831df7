"""The gradient of one batch: whole, or in parts where memory is short.

Parts give the gradient of the whole batch: exactly, but for the order of float sums, unless the network
holds BatchNorm in train mode, whose statistics are then those of the parts (measured on ResNet-18: 92 %
off; ViT and ConvNeXt: 1e-6).

Shape legend: B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune.data.loader import Batch
from finetune.errors import EnvironmentFaultError, LostProcessError
from finetune.system.device import Precision, is_out_of_memory, release_memory, seed_everything
from finetune.system.display import Display
from finetune.system.distributed import Distributed
from finetune.system.forward import autocast
from finetune.targets import compute_share
from finetune.training.ddp import REHEARSALS, Replicas, Share, waits_in_forward
from finetune.training.state import Progress, add_up
from finetune.training.task import Task


class Gradient:
    """Runs a network forwards and backwards.

    Args:
        network: (B, 3, H, W) -> (B, K).
        loss: of (logits, labels (B,) or soft labels (B, K)).
        mixer: of whole batches, before they are split.
        scaler: of the loss, for float16.
        precision: of the forward pass.
        forward: what makes logits of a batch, where that is not the network itself but its rest under a cut.
        replicas: forwards of several processes, whose gradients are added up; ``forward`` is theirs.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: nn.Module,
        mixer: nn.Module | None,
        scaler: torch.amp.GradScaler,
        precision: Precision,
        forward: Callable[[Tensor], Tensor] | None = None,
        replicas: Replicas | None = None,
    ) -> None:
        self.network, self.loss, self.mixer = network, loss, mixer
        self.forward, self.replicas = replicas or forward or network, replicas
        self.scaler, self.precision = scaler, precision

    def compute(self, batch: Batch, microbatch: int = 0, factor: float = 1.0, alone: bool = False) -> Tensor:
        """Add the batch's gradient to the parameters' ``grad``, and return its loss, detached.

        Args:
            batch: images and labels on the device.
            microbatch: images at a time; 0 takes all at once.
            factor: of the loss; 0 where the images only stand in for none.
            alone: leave other processes out of it.
        """
        images, labels = batch.images, batch.labels
        if self.mixer is not None and factor:
            images, labels = self.mixer(images, labels)
        number = -(-len(images) // microbatch) if microbatch else 1
        number = max(1, min(number, len(images) // least_part(self.network)))
        total = torch.zeros((), device=images.device)
        parts = zip(images.tensor_split(number), labels.tensor_split(number), strict=True)
        for place, (part, part_labels) in enumerate(parts, 1):
            together = self.replicas is None or (place == number and not alone)
            with nullcontext() if together or self.replicas is None else self.replicas.alone():
                with autocast(images.device, self.precision):
                    loss: Tensor = self.loss(self.forward(part).float(), part_labels)
                loss = loss * compute_share(self.loss, part_labels, labels) if number > 1 else loss
                loss = loss * factor if factor != 1.0 else loss
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        return total


def learns_batch_statistics(network: nn.Module) -> bool:
    """Return whether a BatchNorm normalises by the batch's own statistics, so that parts are not exact."""
    return any(isinstance(layer, _BatchNorm) and layer.training for layer in network.modules())


def least_part(network: nn.Module) -> int:
    """Return how few images may go through a network at a time: BatchNorm cannot train on a single value."""
    return 2 if learns_batch_statistics(network) else 1


def halve(network: nn.Module, microbatch: int) -> int:
    """Return half of a microbatch, but no less than the network needs, and no more than it was."""
    return max(-(-microbatch // 2), min(microbatch, least_part(network)))


def halve_or_refuse(network: nn.Module, microbatch: int, found: str) -> int:
    """Return a smaller microbatch.

    Raises:
        EnvironmentFaultError: the network needs this many, and ``found`` says what ran out.
    """
    half = halve(network, microbatch)
    if half == microbatch:
        fix = "Lower --img-size, take a smaller backbone, or --strategy top or freeze."
        asked = f"training with {microbatch} image{'s' if microbatch > 1 else ''} at a time"
        raise EnvironmentFaultError(asked, found, fix)
    return half


def describe_parts(network: nn.Module, progress: Progress, batch_size: int) -> str:
    """Say that batches go through in parts now, and whether that is exact."""
    but = "; BatchNorm normalises each microbatch, so the result differs from that of whole batches"
    return (
        f"memory ran out at step {progress.step + 1}; batches of {batch_size} are now split into "
        f"microbatches of {progress.microbatch}{but if learns_batch_statistics(network) else ''}"
    )


def is_learnable(network: nn.Module, num_images: int, any_lost: bool) -> bool:
    """Return whether a batch has images enough; those that were lost may leave too few."""
    return num_images >= (least_part(network) if any_lost else 1)


class KeptBuffers:
    """Running statistics before a step, to be given back when the step is not made.

    A batch that is no number reaches them in the forward pass, long before any gradient is looked at; and
    a variance that overflows there makes outputs of 0, so that neither loss nor gradient tells of it.
    """

    def __init__(self, network: nn.Module) -> None:
        self._owned = [
            buffer for layer in network.modules() if layer.training for buffer in layer.buffers(recurse=False)
        ]
        self._copies = [buffer.clone() for buffer in self._owned]
        floats = [buffer for buffer in self._owned if buffer.is_floating_point() and buffer.numel()]
        self._finite = [buffer for buffer in floats if buffer.isfinite().all()]  # no masks of -inf

    def add_up(self) -> list[Tensor]:
        """Return the sum of all their values, in a list; an empty one where there are none."""
        return [add_up(self._finite)] if self._finite else []

    @torch.no_grad()
    def keep(self) -> None:
        """Copy them."""
        if self._owned:
            torch._foreach_copy_(self._copies, self._owned)

    @torch.no_grad()
    def give_back(self) -> None:
        """Undo every change since :meth:`keep`."""
        if self._owned:
            torch._foreach_copy_(self._owned, self._copies)


# --- The gradient of a step, tried again with smaller parts of the batch while memory runs out ---


class MicrobatchRunner:
    """Computes gradients of one training.

    Several processes wait for each other while gradients are added up, so that one that runs out of memory
    there takes all of them with it. So they rehearse steps alone, and agree on the size of the parts; but not
    where they wait for each other in the forward pass too (SyncBatchNorm).

    Args:
        task: network, loss and data.
        gradient: of one batch.
        optimizer: whose weights learn.
        seed: of the random numbers of every step.
        distributed: the processes.
        display: told of smaller parts.
    """

    def __init__(
        self,
        task: Task,
        gradient: Gradient,
        optimizer: torch.optim.Optimizer,
        seed: int,
        distributed: Distributed,
        display: Display,
    ) -> None:
        self.task, self.gradient, self.optimizer, self.seed = task, gradient, optimizer, seed
        self.distributed, self.display = distributed, display
        self._rehearsals = REHEARSALS if gradient.replicas is not None else 0

    def compute(self, share: Share, progress: Progress, buffers: KeptBuffers) -> torch.Tensor:
        """Return the loss, with the gradient in place.

        Args:
            share: of the batch, which is this process's.
            progress: whose microbatch may become smaller.
            buffers: kept before the step.

        Raises:
            EnvironmentFaultError: one image at a time is too much for the memory.
            LostProcessError: memory ran out in this process while others waited for it.
        """
        batch, replicas = share.batch, self.gradient.replicas
        if not len(batch.labels):
            batch = self._stand_in(batch)
        if replicas is not None and waits_in_forward(self.task.network):
            self._rehearsals = 0
            replicas.connect(has_unused=True)
        while self._rehearsals:
            self._rehearse(batch, share, progress, buffers)
        while True:
            found = self._try(batch, share, progress)
            if not isinstance(found, str):
                return found
            if replicas is not None:
                asked, fix = (
                    f"training, step {progress.step + 1}",
                    "Run the command again, or lower --batch-size.",
                )
                raise LostProcessError(asked, f"memory ran out while other processes waited ({found})", fix)
            buffers.give_back()
            self._halve(progress, len(batch.labels), found)

    def _try(self, batch: Batch, share: Share, progress: Progress, alone: bool = False) -> torch.Tensor | str:
        """Return the loss, or what ran out."""
        own = (self.distributed.rank,) if self.distributed.rank else ()  # each process draws masks of its own
        seed_everything(self.seed, "step", progress.step, *own)
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with self.distributed.translated():
                return self.gradient.compute(batch, progress.microbatch, share.factor, alone)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            found = " ".join(str(error).split())[:200] or "there is no memory left"
        # Outside of the except block: its traceback would keep every activation alive.
        self.optimizer.zero_grad(set_to_none=True)
        release_memory()
        return found

    def _halve(self, progress: Progress, batch_size: int, found: str) -> None:
        now = min(progress.microbatch or batch_size, batch_size)
        progress.microbatch = halve_or_refuse(self.task.network, now, found)
        self.display.warn(describe_parts(self.task.network, progress, batch_size))

    # --- among several processes -----------------------------------------------------------------

    def _rehearse(self, batch: Batch, share: Share, progress: Progress, buffers: KeptBuffers) -> None:
        """Make the step alone and undo it; where memory ran out in any process, all halve their parts."""
        replicas = self.gradient.replicas
        assert replicas is not None
        found = self._try(batch, share, progress, alone=True)
        learning = (weight for group in self.optimizer.param_groups for weight in group["params"])
        has_unused = any(weight.grad is None for weight in learning)
        buffers.give_back()
        self.optimizer.zero_grad(set_to_none=True)
        said = [text for text in self.distributed.collect(found if isinstance(found, str) else "") if text]
        if said:
            self._rehearsals = REHEARSALS
            self._halve(progress, -(-share.num_images // self.distributed.size), said[0])
            return
        replicas.connect(self.distributed.any(has_unused))
        self._rehearsals -= 1

    def _stand_in(self, batch: Batch) -> Batch:
        """Return zeros to go through the network where a process has no image: all must add up gradients."""
        shape = self.task.train.input_size or batch.images.shape[1:]
        device, number = batch.images.device, least_part(self.task.network)
        images = torch.zeros(number, *shape, device=device)
        labels = torch.zeros(number, dtype=torch.int64, device=device)
        return Batch(images, labels, labels, batch.lost)
