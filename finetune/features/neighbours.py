"""Nearest neighbours by the cosine of their angle: a classifier that learns nothing.

The five nearest vote for their classes, with the weight exp(cosine / 0.07), as in the evaluation of features
that were learned without labels (arXiv:1805.01978).

Pictures are compared over some of the features at a time, so that neither many pictures nor many features
have to be in memory together.

Shape legend: N training pictures, M test pictures, B of them in a block, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from finetune.features.rows import Rows

NEIGHBOURS = 5
"""Pictures that vote, or all if there are fewer."""
TEMPERATURE = 0.07
_BLOCK_BYTES = 256 * 2**20
"""Of the cosines of a block, and of the features that are compared at a time."""
_SHORTEST = 1e-12
"""Length in place of zero: a picture without features is at right angles to all."""


def leave_one_out(rows: Rows, indices: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return whether the neighbours of each picture among the others give it its class, (N,) bool.

    Args:
        rows: (all pictures, D).
        indices: (N,) int64, the pictures that count.
        labels: (N,) int64, their classes.
        num_classes: K.
    """
    return _vote(rows, indices, labels, indices, num_classes, True) == labels


def classify(rows: Rows, train: Tensor, labels: Tensor, test: Tensor, num_classes: int) -> Tensor:
    """Return the class that its neighbours among training pictures give each test picture, (M,) int64.

    Of equally near pictures the first ones of ``train`` vote, and of equal votes the lowest class wins.

    Args:
        rows: (all pictures, D).
        train: (N,) int64, training pictures.
        labels: (N,) int64, their classes.
        test: (M,) int64, the others.
        num_classes: K.
    """
    return _vote(rows, train, labels, test, num_classes, False)


def _vote(rows: Rows, train: Tensor, labels: Tensor, test: Tensor, num_classes: int, is_same: bool) -> Tensor:
    found = []
    size = max(1, _BLOCK_BYTES // (4 * len(train)))
    for start in range(0, len(test), size):
        part = test[start : start + size]
        cosines = _compare(rows, part, train)
        if is_same:
            cosines.diagonal(start).fill_(-torch.inf)
        places = _find_nearest(cosines, min(NEIGHBOURS, len(train) - is_same))
        weights = (cosines.gather(1, places) / TEMPERATURE).exp()
        votes = cosines.new_zeros(len(part), num_classes)
        classes = labels.to(cosines.device)[places]
        for neighbour in range(places.shape[1]):  # one at a time: sums have the same order on every device
            one = slice(neighbour, neighbour + 1)
            votes.scatter_add_(1, classes[:, one], weights[:, one])
        found.append(votes.argmax(dim=1))
    return torch.cat(found).cpu()


def _compare(rows: Rows, asked: Tensor, known: Tensor) -> Tensor:
    """Return cosines (B, N) float32, summed over blocks of features."""
    device = rows.columns(asked[:1], 0, 1).device
    products = torch.zeros(len(asked), len(known), device=device)
    squares = torch.zeros(len(asked), device=device), torch.zeros(len(known), device=device)
    for start, stop in _blocks(rows.shape[1], len(asked) + len(known)):
        ours = rows.columns(asked, start, stop).float()
        theirs = rows.columns(known, start, stop).float()
        products.addmm_(ours, theirs.T)
        squares[0].add_(ours.square().sum(dim=1))
        squares[1].add_(theirs.square().sum(dim=1))
    lengths, others = (one.sqrt().clamp_min(_SHORTEST) for one in squares)
    return products.div_(lengths[:, None]).div_(others)


def _blocks(num_columns: int, num_rows: int) -> Iterator[tuple[int, int]]:
    width = max(1, _BLOCK_BYTES // (4 * num_rows))
    for start in range(0, num_columns, width):
        yield start, min(start + width, num_columns)


def _find_nearest(cosines: Tensor, count: int) -> Tensor:
    """Return the places of the ``count`` largest of each row in ascending order, (B, count).

    ``topk`` takes any of equal cosines. Where there are more of the last one than are wanted, the first are
    taken.
    """
    values, places = cosines.topk(min(count + 1, cosines.shape[1]), dim=1)
    last = values[:, count - 1]
    if values.shape[1] > count:
        for row in (values[:, count] == last).nonzero().flatten().tolist():
            nearer = (cosines[row] > last[row]).nonzero().flatten()
            equal = (cosines[row] == last[row]).nonzero().flatten()
            places[row, :count] = torch.cat([nearer, equal])[:count]
    return places[:, :count].sort(dim=1).values
