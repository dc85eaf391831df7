"""Optimisers, losses and mixed batches, built from plain settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from finetune.recipe import TrainingSettings


def build_optimizer(groups: list[dict[str, Any]], settings: TrainingSettings) -> torch.optim.Optimizer:
    """Return SGD with momentum, or AdamW, over named groups that carry their own rate and decay.

    On a GPU one kernel updates all weights.
    """
    fused = all(weight.is_cuda for group in groups for weight in group["params"]) or None
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum, fused=fused)
    return torch.optim.AdamW(groups, fused=fused)


def build_loss(settings: TrainingSettings, counts: Sequence[int]) -> nn.CrossEntropyLoss:
    """Return the cross entropy of the recipe.

    Args:
        settings: label smoothing and class weights.
        counts: training images of each class.
    """
    weights = compute_class_weights(counts) if settings.class_weights == "balanced" else None
    return nn.CrossEntropyLoss(weight=weights, label_smoothing=settings.label_smoothing)


def compute_class_weights(counts: Sequence[int]) -> Tensor:
    """Return inverse class frequencies, scaled so that their mean is 1: (K,) float32."""
    inverse = 1.0 / torch.tensor(counts, dtype=torch.float64).clamp_min(1)
    return (inverse / inverse.mean()).float()


def build_mixer(settings: TrainingSettings, num_classes: int) -> nn.Module | None:
    """Return mixup, cutmix, or one of them at random a batch; None when both are off.

    The mixer takes images (B, 3, H, W) and labels (B,), and gives images and soft labels (B, K).
    """
    kinds = ((settings.mixup, v2.MixUp), (settings.cutmix, v2.CutMix))
    mixers = [kind(alpha=alpha, num_classes=num_classes) for alpha, kind in kinds if alpha > 0]
    if not mixers:
        return None
    mixer: nn.Module = mixers[0] if len(mixers) == 1 else v2.RandomChoice(mixers)
    return mixer
