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
from finetune.errors import EnvironmentFaultError
from finetune.evaluation.predict import autocast
from finetune.runtime import Precision
from finetune.training.finite import add_up
from finetune.training.parallel import Replicas
from finetune.training.progress import Progress


class Gradient:
    """Runs a network forwards and backwards.

    Args:
        network: (B, 3, H, W) -> (B, K).
        loss: cross entropy of (logits, labels (B,) or soft labels (B, K)).
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
                loss = loss * self._share(part_labels, labels) if number > 1 else loss
                loss = loss * factor if factor != 1.0 else loss
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        return total

    def _share(self, part: Tensor, whole: Tensor) -> Tensor | float:
        """A part's weight in the mean: hard labels with class weights are divided by the sum of these."""
        weight = getattr(self.loss, "weight", None)
        if weight is None or whole.ndim > 1:
            return len(part) / len(whole)
        share: Tensor = weight[part].sum() / weight[whole].sum()
        return share


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
    but = "; BatchNorm sees these smaller parts, so the result is not that of whole batches"
    return (
        f"memory ran out at step {progress.step + 1}; batches of {batch_size} now go through in parts of "
        f"{progress.microbatch}{but if learns_batch_statistics(network) else ''}"
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
