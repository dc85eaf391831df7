"""Folds of cross-validation on features: classes are spread evenly, and groups stay whole."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_folds(labels: Tensor, num_folds: int, seed: int, groups: Tensor | None = None) -> Tensor:
    """Return the fold in which each image is held out, (N,) int64 in [0, ``num_folds``), -1 for never.

    The groups of a class are distributed over the folds in turn, in random order, so every class has a
    training image in every fold. Images whose group is the only one of its class are never held out.

    Args:
        labels: (N,) int64.
        num_folds: at least 2. Some are empty where there are fewer groups.
        seed: the seed of the random order.
        groups: (N,) int64; images of equal numbers get the same fold. By default each is a group.
    """
    groups = torch.arange(len(labels)) if groups is None else groups
    num_groups = torch.unique(torch.stack([labels, groups]), dim=1)[0].bincount()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]
    order = order[num_groups[labels[order]] > 1]
    turns = dict.fromkeys(groups[order].tolist())
    turns = {group: turn % num_folds for turn, group in enumerate(turns)}
    folds = torch.full_like(labels, -1)
    folds[order] = torch.tensor([turns[group] for group in groups[order].tolist()], dtype=torch.int64)
    return folds
