"""The learning curve of a linear classifier: accuracy on new images by number of training images.

::

    all images -> subsets, class by class, groups whole -> ridge regression -> tested on the other groups
    all images ------------------------------------------> leave-groups-out, exact

Every image is a test image of every point, so the points share the luck of these images; their covariance
says how much.

Shape legend: N images, D features, P points of the curve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune.features.ridge import leave_groups_out, predict_others
from finetune.features.rows import Rows
from finetune.system.device import derive_seed

FEWEST_A_CLASS = 8
"""Images of the smallest class below which no curve is measured: its subsets would have one or two."""
NUM_SUBSETS = 10
"""Subsets of each size."""
_NUM_SIZES = 6
"""Sizes of subsets, evenly spaced by their logarithm; all images are one more point."""
_LARGEST_SHARE = 0.75
"""Largest subset as a share of all images: the others are tested."""
_SMALLEST_SHARE, _FEWEST_IN_A_SUBSET = 0.12, 3
"""Smallest subset, as a share of all images and in images of the smallest class. Smaller ones lie where the
curve does not follow a power law yet (arXiv:1712.00409)."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LearningCurve:
    """Accuracy on new images by number of training images.

    Attributes:
        sizes: mean number of training images of each point, (P,); the last is N.
        accuracies: accuracy of each point, (P,), in [0, 1].
        covariance: of the points (P, P), over other images of the same kind: those tested and those learned
            from.
        num_images: N.
    """

    sizes: Floats
    accuracies: Floats
    covariance: Floats
    num_images: int


def count_fits() -> int:
    """Return how often :func:`measure_curve` calls ``on_done``."""
    return _NUM_SIZES * NUM_SUBSETS + 1


def measure_curve(
    rows: Rows,
    labels: Tensor,
    groups: Tensor,
    num_classes: int,
    seed: int,
    device: torch.device,
    on_done: Callable[[], None] = lambda: None,
) -> LearningCurve:
    """Measure the learning curve of ridge regression on features.

    Args:
        rows: (N, D).
        labels: (N,) int64; each class has at least :data:`FEWEST_A_CLASS` images.
        groups: (N,) int64; images of equal numbers are never on both sides of a test.
        num_classes: at least 2.
        seed: draws the subsets.
        device: solves.
        on_done: called after each fit, :func:`count_fits` times.
    """
    sizes, rates, variances = [], [], []
    for share in choose_shares(int(labels.bincount(minlength=num_classes).min())):
        tested, right = torch.zeros(len(labels)), torch.zeros(len(labels))
        accuracies, numbers, spreads = [], [], []
        for number in range(NUM_SUBSETS):
            own_seed = derive_seed(seed, "forecast", round(1e6 * share), number)
            train = draw_subset(labels, groups, share, own_seed)
            test = find_others(groups, train)
            predicted = predict_others(
                rows, train, labels[train], test, num_classes, device, groups=groups[train]
            )
            hits = (predicted == labels[test]).float()
            tested[test] += 1
            right[test] += hits
            accuracies.append(hits.mean().item())
            spreads.append(hits.var(correction=0).item() / len(hits))
            numbers.append(len(train))
            on_done()
        sizes.append(float(np.mean(numbers)))
        rates.append((right / tested).double().numpy())
        variances.append(max(0.0, np.var(accuracies, ddof=1) - np.mean(spreads)))
    everything = torch.arange(len(labels))
    hits = leave_groups_out(rows, everything, labels, num_classes, device, groups)
    on_done()
    sizes.append(float(len(labels)))
    rates.append(hits.double().numpy())
    matrix, places = np.array(rates), np.array(sizes)
    luck = _compute_luck(places, np.array(variances))
    covariance = _compute_covariance(matrix, groups.numpy()) + luck
    return LearningCurve(places, np.nanmean(matrix, axis=1), covariance, len(labels))


def choose_shares(smallest_class: int) -> list[float]:
    """Return the sizes of the subsets, as shares of all images, from the number of the smallest class."""
    first = max(_SMALLEST_SHARE, _FEWEST_IN_A_SUBSET / smallest_class)
    return [float(share) for share in np.geomspace(first, _LARGEST_SHARE, _NUM_SIZES)]


def draw_subset(labels: Tensor, groups: Tensor, share: float, seed: int) -> Tensor:
    """Return the indices of a share of each class, drawn group by group, (M,) int64 in ascending order.

    A class gives at least one group. It keeps at least one for testing, where it has two or more.

    Args:
        labels: (N,) int64.
        groups: (N,) int64. A group of several classes goes with the first class that draws it.
        share: of the images of each class, in (0, 1).
        seed: of the random order.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    drawn: set[int] = set()
    refused: set[int] = set()
    for label in torch.unique(labels).tolist():
        own = groups[order[labels[order] == label]].tolist()
        sizes: dict[int, int] = {}
        for group in own:
            sizes[group] = sizes.get(group, 0) + 1
        wanted = share * len(own) - sum(size for group, size in sizes.items() if group in drawn)
        free = [group for group in sizes if group not in drawn and group not in refused]
        taken = _take_groups(free, sizes, wanted, must=not drawn.intersection(sizes))
        if taken and len(taken) == len(sizes) > 1:
            taken = taken[:-1]
        drawn.update(taken)
        refused.update(set(free).difference(taken))
    chosen = torch.tensor(sorted(drawn), dtype=torch.int64)
    return torch.isin(groups, chosen).nonzero().flatten()


def _take_groups(free: Sequence[int], sizes: dict[int, int], wanted: float, must: bool) -> list[int]:
    """Return the first groups until another one would lead further away from the wanted number of images."""
    taken: list[int] = []
    number = 0
    for group in free:
        if number + sizes[group] / 2 > wanted and not (must and not taken):
            break
        taken.append(group)
        number += sizes[group]
    return taken


def find_others(groups: Tensor, train: Tensor) -> Tensor:
    """Return the indices of the images whose group has no training image, (M,) int64."""
    return (~torch.isin(groups, groups[train])).nonzero().flatten()


# --- noise ---------------------------------------------------------------------------------------


def _compute_covariance(rates: Floats, groups: NDArray[np.int64]) -> Floats:
    """Return the covariance (P, P) of mean rates over other test images, drawn group by group.

    Where nearly all images are right, the images at hand vary too little: one image's worth is added.

    Args:
        rates: how often each image was recognised at each point, (P, N) in [0, 1]; NaN where never tested.
        groups: (N,).
    """
    known = ~np.isnan(rates)
    shares = np.where(known, rates - np.nanmean(rates, axis=1, keepdims=True), 0.0)
    shares /= known.sum(axis=1, keepdims=True)
    _, numbers = np.unique(groups, return_inverse=True)
    sums = np.zeros((numbers.max() + 1, len(rates)))
    np.add.at(sums, numbers, shares.T)
    one = 1 / len(groups)
    return sums.T @ sums + one**2 + 0.25 * one**2 * np.eye(len(rates))


def _compute_luck(sizes: Floats, variances: Floats) -> Floats:
    """Return the covariance (P, P) of the luck of having these training images and no others.

    The variance of the accuracy over training sets of n images is taken as k / n, with k from the subsets of
    up to half of all images, whose variances are known best. The mean over many subsets then varies with the
    N images by at most n / N times k / n (Hoeffding 1948, theorem 5.2), and by what so few subsets add.

    Args:
        sizes: (P,); the last is N.
        variances: of the accuracy over subsets of each size but N, (P - 1,), without those of test images.
    """
    known = sizes[:-1] <= sizes[-1] / 2
    each = float(np.mean(variances[known] * sizes[:-1][known]))
    few = each / sizes / NUM_SUBSETS * (1 - sizes / sizes[-1])
    covariance: Floats = each / sizes[-1] + np.diag(few)
    return covariance
