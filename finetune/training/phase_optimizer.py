"""One phase of training: which stages are frozen, and the optimizer of the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from finetune.recipe import TrainingSettings
from finetune.training.freeze import (
    build_param_groups,
    check_frozen,
    digest_frozen,
    freeze,
    set_train_mode,
)
from finetune.training.optim import build_optimizer
from finetune.training.plan import Plan
from finetune.training.state import compute_norm, is_finite


class PhaseOptimizer:
    """Freezes a network for one phase, and optimizes the trained stages, starting without momentum.

    Args:
        network: network on its device; it is frozen immediately.
        plan: plan of the whole run.
        epoch: epoch, from 0, that selects the phase.
        settings: section ``training`` of the recipe.
        scaler: loss scaler for float16.

    Attributes:
        plan: plan of the phase.
        optimizer: optimizer of the trained stages.
    """

    def __init__(
        self,
        network: nn.Module,
        plan: Plan,
        epoch: int,
        settings: TrainingSettings,
        scaler: torch.amp.GradScaler,
    ) -> None:
        self.network, self.plan = network, plan.at(epoch)
        self._clip, self._scaler = settings.clip_grad, scaler
        freeze(network, self.plan)
        network.zero_grad(set_to_none=True)  # gradients of the previous phase
        groups = build_param_groups(network, self.plan, settings.weight_decay, settings.bias_lr_factor)
        self.optimizer = build_optimizer(groups, settings)
        self._weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        self._is_only = self.plan is plan  # then the caller checks the frozen stages of the whole run
        self._frozen: dict[str, str] = {}

    def begin_epoch(self) -> None:
        """Set train and eval modes; before the phase's first epoch, take digests of the frozen tensors."""
        set_train_mode(self.network, self.plan)
        if not self._is_only and not self._frozen:
            self._frozen = digest_frozen(self.network, self.plan)

    def set_lr(self, factor: float) -> float:
        """Set every group's lr to its base lr times a factor; return the lr of the uppermost stage."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        return self.plan.trained[-1].lr * factor  # rows go from stem to head

    def is_usable(self, loss: Tensor, statistics: Sequence[Tensor]) -> bool:
        """Return whether loss, gradient and sums of running statistics are finite."""
        if self._scaler.is_enabled():
            # float16 finds its scale by infinite gradients; the scaler itself skips such a step.
            self._scaler.unscale_(self.optimizer)
            return is_finite(loss, *statistics) and self._scaler.get_scale() >= 1.0
        self._norm = compute_norm(self._weights)
        return is_finite(loss, self._norm, *statistics)

    def step(self) -> None:
        """Clip the gradient if asked for, and update the weights; call it after :meth:`is_usable`."""
        if self._clip is not None:
            if self._scaler.is_enabled():
                self._norm = compute_norm(self._weights)
            nn.utils.clip_grads_with_norm_(self._weights, self._clip, self._norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()

    def skip(self) -> None:
        """Discard the gradient of a step."""
        self.optimizer.zero_grad(set_to_none=True)
        if self._scaler.is_enabled():
            self._scaler.update()

    def check_frozen(self) -> None:
        """Verify that no frozen tensor changed since the phase's first epoch.

        Raises:
            InternalError: a frozen tensor changed.
        """
        if self._frozen:
            check_frozen(self.network, self.plan, self._frozen)
