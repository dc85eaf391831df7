"""Images that come in groups: bursts of one object, frames of one video, tiles of one specimen.

A fold that is predicted from other views of the same objects says nothing about new objects. In a group, the
nearest images are far nearer than those just outside of it; among independent images all near ones are about
equally far, since features have hundreds of dimensions. So two images of a class are look-alikes if their
distance is small against that of the ``REACH``-th nearest image of the class, seen from both.

Shape legend: N images, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from finetune.features.rows import Rows

REACH = 12
"""Look-alikes are nearer than the 12th nearest image: groups of up to ten are found whole."""
CONTRAST = 0.65
"""Largest distance of look-alikes, as a share of that of the ``REACH``-th nearest image of the class
(docs/advise.md has what was measured)."""
_CONTRAST_TO_ANY = 0.5
"""The same, as a share of that of the ``REACH``-th nearest image of any class. On photographs of groceries, 7
to 16 a class, accuracy with groups left out was 7 to 9 points too low with 0.65, and one point with 0.5."""
MOST_IMAGES = 5_000
"""Largest class whose images are compared; their distances take 100 MB."""
_BLOCK_NUMBERS = 2**24
"""Distances that are in memory at once, where all images are compared."""


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


def find_groups_of_small_classes(
    rows: Rows, indices: Tensor, labels: Tensor, known: Sequence[str] = ()
) -> Tensor:
    """Return the number of each image's group, (N,) int64, where classes may have eight images.

    In a class of few images the ``REACH``-th nearest is the farthest, and every neighbour looks near: of
    handwritten characters, 20 independent ones a class, :func:`find_groups` links half. So look-alikes are
    near against the ``REACH``-th nearest image of any class, and against the middle of their own class.

    Args:
        rows, indices, labels, known: see :func:`find_groups`.
    """
    number = len(indices)
    groups = torch.arange(number)
    if number <= REACH:
        return _join_known(groups, known)
    middle = _mean(rows, indices)
    parts = torch.split(groups, max(1, _BLOCK_NUMBERS // number))
    views = torch.cat([torch.nn.functional.normalize(rows[indices[part]].float() - middle) for part in parts])
    limits, pairs = _find_limits_in_class(views, labels), []
    for part in parts:
        distances = torch.cdist(views[part], views)
        reach = distances.kthvalue(REACH + 1, dim=1).values  # the image itself is one
        limits[part] = torch.minimum(limits[part], _CONTRAST_TO_ANY * reach)
        is_near = (distances < limits[part, None]) & (labels[part, None] == labels)
        pairs += (is_near.nonzero() + torch.tensor([int(part[0]), 0])).tolist()
    near = set(map(tuple, pairs))
    linked = [(one, other) for one, other in pairs if one < other and (other, one) in near]
    groups = _join_pairs(groups, linked)
    for label in torch.unique(labels).tolist():
        places = (labels == label).nonzero().flatten()
        if len(torch.unique(groups[places])) < 2:
            groups[places] = places
    return _join_known(groups, known)


def _find_limits_in_class(views: Tensor, labels: Tensor) -> Tensor:
    """Return the largest distance of look-alikes against other images of the class, (N,).

    Of a class of few images it is a share of the distance to the nearer half, of others to the ``REACH``-th.
    """
    limits = torch.full((len(labels),), torch.inf)
    for label in torch.unique(labels).tolist():
        places = (labels == label).nonzero().flatten()
        reach = min(REACH, len(places) // 2)
        for part in torch.split(places, max(1, _BLOCK_NUMBERS // len(places))) if reach else ():
            distances = torch.cdist(views[part], views[places])
            limits[part] = CONTRAST * distances.kthvalue(reach + 1, dim=1).values
    return limits


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
    return places[_join_pairs(torch.arange(number), is_linked.triu().nonzero().tolist())]


def _join_pairs(own: Tensor, pairs: Sequence[Sequence[int]]) -> Tensor:
    """Return the first place of each image's group, (N,), from linked pairs; ``own`` are the places alone."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ones, others = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    links = coo_array((np.ones(len(ones)), (ones, others)), shape=(len(own), len(own)))
    numbers = torch.from_numpy(connected_components(links, directed=False)[1]).long()
    first = torch.full_like(own, len(own)).scatter_reduce(0, numbers, own, "amin")[numbers]
    sizes = first.bincount(minlength=len(own))[first]
    return torch.where(sizes <= REACH, first, own)  # more are no burst, but a chain


def _join_known(groups: Tensor, known: Sequence[str]) -> Tensor:
    firsts: dict[str, int] = {}
    for place, name in enumerate(known):
        if name:
            other, own = firsts.setdefault(name, int(groups[place])), int(groups[place])
            if own != other:
                groups[groups == own] = other
    return groups
