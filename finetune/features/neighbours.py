"""Nearest neighbours by the cosine of their angle: a classifier that learns nothing.

The five nearest vote for their classes, with the weight exp(cosine / 0.07), as in the evaluation of features
that were learned without labels (arXiv:1805.01978).

Shape legend: N pictures, B of them in a block, D numbers for each, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.features.rows import Rows

NEIGHBOURS = 5
TEMPERATURE = 0.07
_BLOCK = 1024
"""Pictures that are compared with as many others at a time."""


def leave_one_out(rows: Rows, indices: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return whether the neighbours of each picture among the others give it its class, (N,) bool.

    Args:
        rows: (all pictures, D).
        indices: (N,) int64, the pictures that count.
        labels: (N,) int64, their classes.
        num_classes: K.
    """
    return _vote(rows, indices, indices, labels, num_classes, True) == labels


def classify(rows: Rows, train: Tensor, labels: Tensor, test: Tensor, num_classes: int) -> Tensor:
    """Return the class that its neighbours among training pictures give each test picture, (M,) int64.

    Args:
        rows: (all pictures, D).
        train: (N,) int64, training pictures.
        labels: (N,) int64, their classes.
        test: (M,) int64, the others.
        num_classes: K.
    """
    return _vote(rows, train, test, labels, num_classes, False)


def _vote(rows: Rows, train: Tensor, test: Tensor, labels: Tensor, num_classes: int, is_same: bool) -> Tensor:
    found = []
    for start, asked in _blocks(rows, test):
        best = torch.full((len(asked), NEIGHBOURS), -torch.inf)
        votes = torch.zeros(len(asked), NEIGHBOURS, dtype=torch.int64)
        for begin, known in _blocks(rows, train):
            cosines = asked @ known.T
            if is_same and begin == start:
                cosines.fill_diagonal_(-torch.inf)
            cosines = torch.cat([best, cosines], dim=1)
            classes = torch.cat([votes, labels[begin : begin + len(known)].expand(len(asked), -1)], dim=1)
            # Stable: of equal cosines, the picture that comes first.
            order = cosines.argsort(dim=1, descending=True, stable=True)[:, :NEIGHBOURS]
            best, votes = cosines.gather(1, order), classes.gather(1, order)
        weights = torch.where(best.isinf(), 0.0, (best / TEMPERATURE).exp())
        found.append(torch.zeros(len(asked), num_classes).scatter_add_(1, votes, weights).argmax(dim=1))
    return torch.cat(found)


def _blocks(rows: Rows, indices: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield where a block begins, and its rows of length one, (B, D)."""
    for start in range(0, len(indices), _BLOCK):
        yield start, F.normalize(rows[indices[start : start + _BLOCK]].float(), dim=1)
