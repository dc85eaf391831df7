"""Optimizer, mixup and cutmix, lr schedule and early stopping, as the recipe's section ``training`` says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchvision.transforms import v2

from finetune.errors import UsageError
from finetune.recipe import TrainingSettings
from finetune.targets import is_better
from finetune.training.state import Checkpoint, Progress


def build_optimizer(groups: list[dict[str, Any]], settings: TrainingSettings) -> torch.optim.Optimizer:
    """Return SGD with (Nesterov) momentum, or AdamW, over groups with their own lr and weight decay.

    On a GPU the fused implementation is used.
    """
    fused = all(weight.is_cuda for group in groups for weight in group["params"]) or None
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=fused)
    kind = FusedSGD if fused else torch.optim.SGD
    return kind(groups, momentum=settings.momentum, nesterov=settings.nesterov, fused=fused)


def check_optimizer(settings: TrainingSettings) -> None:
    """Refuse keys that belong to another optimizer.

    Raises:
        UsageError: Nesterov momentum is asked of AdamW, or of SGD without momentum.
    """
    asked = "training.nesterov=true"
    if settings.nesterov and settings.optimizer != "sgd":
        found = f"{settings.optimizer} has no Nesterov momentum, only sgd has"
        raise UsageError(asked, found, "Add --set training.nesterov=false, or take --optimizer sgd.")
    if settings.nesterov and not settings.momentum:
        fix = "Add --set training.nesterov=false, or a momentum."
        raise UsageError(asked, "training.momentum is 0", fix)


_STATE = {"sgd": {"momentum_buffer"}, "adamw": {"step", "exp_avg", "exp_avg_sq"}}
"""Names of the tensors that each optimizer keeps of a parameter."""


def has_other_optimizer(checkpoint: Checkpoint, settings: TrainingSettings) -> bool:
    """Return whether a checkpoint holds other state than the recipe's optimizer keeps, if it holds any."""
    for snapshot in (checkpoint.now, checkpoint.epoch_start):
        kept = {name.rpartition(":")[2] for name in snapshot.under("optimizer.")}
        if kept and kept != _STATE[settings.optimizer]:
            return True
    return False


def find_odd_state(checkpoint: Checkpoint, network: nn.Module) -> str:
    """Return the name of an optimizer's tensor that does not fit a network; "" if all of them fit.

    A tensor has the shape of its parameter or is a count, and every parameter has the same of them.
    """
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    for snapshot in (checkpoint.now, checkpoint.epoch_start):
        tensors = snapshot.under("optimizer.")
        keys = {name.rpartition(":")[2] for name in tensors}
        for name, tensor in tensors.items():
            parameter = name.rpartition(":")[0]
            is_like = tensor.shape == shapes.get(parameter)
            fits = tensor.is_floating_point() and (is_like or (not tensor.ndim and 0 <= tensor < math.inf))
            if not fits or any(f"{parameter}:{key}" not in tensors for key in keys):
                return name
    return ""


class FusedSGD(torch.optim.SGD):
    """SGD in one kernel, with a momentum that starts with zeros.

    torch leaves the momentum uninitialised until the first step, and a step that float16's loss scaler skips
    counts as one: the next step would then add whatever was in that memory.
    """

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the weights."""
        for group in self.param_groups:
            for weight in group["params"]:
                if group["momentum"] and weight.grad is not None and not self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        super().step(closure)


def build_mixer(settings: TrainingSettings, num_classes: int) -> nn.Module | None:
    """Return mixup, cutmix, or a random one of them per batch; None if both are off.

    The mixer takes images (B, 3, H, W) and labels (B,), and returns images and soft labels (B, K).
    """
    kinds = ((settings.mixup, v2.MixUp), (settings.cutmix, v2.CutMix))
    mixers = [kind(alpha=alpha, num_classes=num_classes) for alpha, kind in kinds if alpha > 0]
    if not mixers:
        return None
    mixer: nn.Module = mixers[0] if len(mixers) == 1 else v2.RandomChoice(mixers)
    return mixer


# --- Learning rate schedule ---
#
# timm's schedulers are not used: their warm-up start and minimum are absolute learning rates shared by all
# groups, which would change the ratio 1 : 1/10 : 1/100 between groups. One factor for all groups keeps it.


@dataclass(frozen=True)
class Schedule:
    """The factor that multiplies every group's base lr.

    Attributes:
        kind: constant, cosine, step or plateau.
        epochs: epochs of the whole run.
        warmup_epochs: epochs in which the factor grows linearly from nearly 0 to 1.
        decay_epochs: epochs between two decays of the step schedule.
        decay_rate: factor of each decay of the step schedule.
        milestones: shares of the run, in (0, 1), at which the step schedule decays instead; empty for every
            ``decay_epochs``.
    """

    kind: str
    epochs: int
    warmup_epochs: float
    decay_epochs: int
    decay_rate: float
    milestones: tuple[float, ...] = ()

    @classmethod
    def from_settings(cls, settings: TrainingSettings) -> Schedule:
        """Return the schedule of a recipe's ``training`` section."""
        return cls(
            settings.schedule,
            settings.epochs,
            min(settings.warmup_epochs, settings.epochs),
            settings.decay_epochs,
            settings.decay_rate,
            settings.milestones,
        )

    def factor(self, step: int, steps_per_epoch: int) -> float:
        """Return the factor of a step (counted from 0), in [0, 1], without that of :class:`Plateau`."""
        warmup_steps = round(self.warmup_epochs * steps_per_epoch)
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if self.kind == "cosine":
            total = max(1, self.epochs * steps_per_epoch - warmup_steps)
            return (1 + math.cos(math.pi * (step - warmup_steps) / total)) / 2
        if self.kind == "step":
            return self.decay_rate ** self._count_decays(step, steps_per_epoch)
        return 1.0

    def _count_decays(self, step: int, steps_per_epoch: int) -> int:
        """Return how often the step schedule has decayed before a step."""
        if not self.milestones:
            return step // steps_per_epoch // self.decay_epochs
        total = self.epochs * steps_per_epoch
        return sum(step >= round(share * total) for share in self.milestones)


@dataclass
class Plateau:
    """Multiplies its factor by ``decay_rate`` after ``patience`` epochs without improvement.

    Attributes:
        patience: epochs without improvement before a decay.
        decay_rate: factor of each decay.
        factor: product of the decays so far.
        bad_epochs: epochs since the best one or the last decay.
    """

    patience: int
    decay_rate: float
    factor: float = 1.0
    bad_epochs: int = 0

    def observe(self, improved: bool) -> None:
        """Update the factor after an epoch."""
        self.bad_epochs = 0 if improved else self.bad_epochs + 1
        if self.bad_epochs >= self.patience:
            self.factor *= self.decay_rate
            self.bad_epochs = 0


# --- After each epoch: best epoch, plateau and early stopping ---


def record_validation(progress: Progress, metrics: dict[str, float], settings: TrainingSettings) -> bool:
    """Update the progress with an epoch's validation metrics; return whether it is the best so far."""
    improved = is_better(metrics, progress.best, settings.monitor)
    progress.bad_epochs = 0 if improved else progress.bad_epochs + 1
    if improved:
        progress.best, progress.best_epoch = metrics, progress.epoch
    if settings.schedule == "plateau":
        plateau = Plateau(
            settings.decay_epochs, settings.decay_rate, progress.plateau_factor, progress.plateau_bad_epochs
        )
        plateau.observe(improved)
        progress.plateau_factor, progress.plateau_bad_epochs = plateau.factor, plateau.bad_epochs
    return improved


def is_over(progress: Progress, settings: TrainingSettings) -> bool:
    """Return whether all epochs are trained, or early stopping ends the training."""
    out_of_patience = settings.patience is not None and progress.bad_epochs >= settings.patience
    return progress.epoch >= settings.epochs or out_of_patience
