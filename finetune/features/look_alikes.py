"""Images that come in groups: bursts of one object, frames of one video, tiles of one specimen.

A fold that is predicted from other views of the same objects says nothing about new objects. In a group, the
nearest images are far nearer than those just outside of it; among independent images all near ones are about
equally far, since features have hundreds of dimensions. So two images of a class are look-alikes if their
distance is small against that of the ``REACH``-th nearest image of the class, seen from both.

Shape legend: N images, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from finetune.features.rows import Rows

REACH = 12
"""Look-alikes are nearer than the 12th nearest image: groups of up to ten are found whole."""
CONTRAST = 0.65
"""Largest distance of look-alikes, as a share of that of the ``REACH``-th nearest image of the class
(docs/advise.md has what was measured)."""
MOST_IMAGES = 5_000
"""Largest class whose images are compared; their distances take 100 MB."""


def find_groups(rows: Rows, indices: Tensor, labels: Tensor, known: Sequence[str] = ()) -> Tensor:
    """Return the number of each image's group, (N,) int64: the place of its first image.

    A class in which that leaves fewer than two groups stays as it is: it could never be held out. So do more
    than ``REACH`` images that are linked one to the next, as features of few dimensions link them.

    Args:
        rows: features (all images, D); those of the last layer tell objects apart best.
        indices: (N,) int64, the images to group.
        labels: (N,) int64, their labels. Images of two classes are never look-alikes.
        known: group of each image, N of them, that the user has named; empty text for none.
    """
    groups, middle = torch.arange(len(indices)), _mean(rows, indices)
    for label in torch.unique(labels).tolist():
        places = (labels == label).nonzero().flatten()
        if 2 < len(places) <= MOST_IMAGES:
            views = torch.nn.functional.normalize(rows[indices[places]].float() - middle)
            own = _link(views, places)
            if len(torch.unique(own)) > 1:
                groups[places] = own
    return _join_known(groups, known)


def _mean(rows: Rows, indices: Tensor) -> Tensor:
    sums = [rows[part].float().sum(dim=0) for part in torch.split(indices, MOST_IMAGES)]
    return torch.stack(sums).sum(dim=0) / len(indices)


def _link(views: Tensor, places: Tensor) -> Tensor:
    """Return the first place of each image's group in a class, from centred features (M, D) of length 1."""
    number = len(places)
    distances = torch.cdist(views, views).fill_diagonal_(torch.inf)
    reach = min(REACH, number - 1)
    limits = CONTRAST * distances.kthvalue(reach, dim=1).values
    is_linked = (distances < limits[:, None]) & (distances < limits[None, :])
    first = torch.arange(number)
    for one, other in is_linked.triu().nonzero().tolist():
        low, high = sorted((int(first[one]), int(first[other])))
        if low != high:
            first[first == high] = low
    sizes = first.bincount(minlength=number)[first]
    return places[torch.where(sizes <= REACH, first, torch.arange(number))]  # more are no burst, but a chain


def _join_known(groups: Tensor, known: Sequence[str]) -> Tensor:
    firsts: dict[str, int] = {}
    for place, name in enumerate(known):
        if name:
            other, own = firsts.setdefault(name, int(groups[place])), int(groups[place])
            if own != other:
                groups[groups == own] = other
    return groups
