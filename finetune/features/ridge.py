"""Ridge regression on features, and what it predicts for images that are left out, without solving again.

With T = U S the standardised features in their principal directions, and y the labels as +1 and -1, the fit
of a penalty p is H y with H = T (S^2 + p)^-1 T' + 1 / N. Leaving a group G of images out multiplies the
residuals of its images by (1 - H_GG)^-1 (for a single image: Allen's PRESS). So one decomposition gives the
errors of all images left out, for every penalty, exactly, where a cross-validation solves for every fold.

Shape legend: N training images, D features, R directions in which the images differ, K classes, B images,
G groups of L images each, M images that are predicted, P labellings, C columns that are predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.features.rows import Rows
from finetune.features.standardised import Standardised, find_directions, standardise
from finetune.system.forward import compute_where_it_fits
from finetune.targets import Target, decide

PENALTIES = tuple(10.0**power for power in range(-4, 4))
"""Penalties for each training image; a feature's own square is 1 for each."""
_BATCH = 2**10
"""Images whose features are in memory at once, in float64."""
_CPU = torch.device("cpu")

Turn = Callable[[Tensor], Tensor]
"""Returns float64 of images, or of what is predicted: see :class:`_Directions`."""


def leave_groups_out(
    rows: Rows,
    indices: Tensor,
    labels: Tensor,
    num_classes: int,
    device: torch.device = _CPU,
    groups: Tensor | None = None,
) -> Tensor:
    """Return whether ridge regression on the other images predicts the label of each image, (N,) bool.

    The penalty is the one with the smallest squared error of the images left out. Means and deviations are
    those of all N images; they do not depend on labels. Where all images are one group, none can be left out,
    and all count as wrong. If the memory of a GPU runs out, the CPU solves.

    Args:
        rows: (all images, D).
        indices: (N,) int64, the training images; no others are read.
        labels: (N,) int64 of these images.
        num_classes: K.
        device: device of the computation.
        groups: (N,) int64; images of equal numbers are left out together. By default each is left out alone.

    Raises:
        InternalError: a feature is not finite.
    """
    groups = torch.arange(len(labels)) if groups is None else groups
    return compute_where_it_fits(
        device,
        lambda place: LeftOutRidge(rows, indices, num_classes, place).find_hits(labels[None], groups)[0],
    )


def score_left_out(
    rows: Rows,
    indices: Tensor,
    labels: Tensor,
    num_classes: int,
    target: Target,
    device: torch.device = _CPU,
    groups: Tensor | None = None,
) -> Tensor:
    """Return the score of each image, predicted by ridge regression on the other images, (N,) float64.

    It is :func:`leave_groups_out` for labels of any kind: their mean is the metric
    ``target.additive_score``. Where all images are one group, none can be left out, and all have 0.

    Args:
        rows, indices, num_classes, device, groups: see :func:`leave_groups_out`.
        labels: (N,) int64, or (N, K) float32, as ``target`` encodes them.
        target: what the labels are.

    Raises:
        InternalError: a feature is not finite.
    """
    groups = torch.arange(len(labels)) if groups is None else groups
    if (groups == groups[0]).all():
        return torch.zeros(len(labels), dtype=torch.float64)
    numbers = _to_signs(labels[None], num_classes) if labels.ndim == 1 else labels.double()

    def predict(place: torch.device) -> Tensor:
        directions = _decompose(standardise(rows, indices, place))
        errors, left_out = _leave_out(directions, numbers.to(place), groups)
        return left_out[int(errors.sum(dim=1).argmin())].cpu()

    return target.score_each(compute_where_it_fits(device, predict), labels)


class LeftOutRidge:
    """Ridge regression on the features of some images, for any number of labellings of the same images.

    The features are decomposed once; a permutation test then pays for the labels only.

    Args:
        rows: (all images, D).
        indices: (N,) int64, the training images; no others are read.
        num_classes: K.
        device: device of the computation.

    Raises:
        InternalError: a feature is not finite.
    """

    def __init__(self, rows: Rows, indices: Tensor, num_classes: int, device: torch.device = _CPU) -> None:
        self._num_classes = num_classes
        self._directions = _decompose(standardise(rows, indices, device))

    def find_hits(self, labels: Tensor, groups: Tensor) -> Tensor:
        """Return whether the label of each image is predicted without the images of its group, (P, N) bool.

        The penalty of each labelling is the one with the smallest squared error of the images left out. Where
        all images are one group, none can be left out, and all count as wrong.

        Args:
            labels: (P, N) int64, P labellings of the images.
            groups: (N,) int64; images of equal numbers are left out together.
        """
        if (groups == groups[0]).all():
            return torch.zeros(labels.shape, dtype=torch.bool)
        targets = _to_signs(labels, self._num_classes).to(self._directions.squares.device)
        errors, left_out = _leave_out(self._directions, targets, groups)
        each = (len(labels), self._num_classes)
        best = errors.view(-1, *each).sum(dim=2).argmin(dim=0)
        scores = left_out.view(*left_out.shape[:2], *each)
        chosen = [scores[int(penalty), :, place] for place, penalty in enumerate(best)]
        return torch.stack([decide(own).cpu() for own in chosen]) == labels


def predict_others(
    rows: Rows,
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    num_classes: int,
    device: torch.device = _CPU,
    groups: Tensor | None = None,
) -> Tensor:
    """Return the classes that ridge regression on some images predicts for other images, (M,) int64.

    It is the classifier of :func:`leave_groups_out`, whose penalty is chosen by leaving training images out.
    If the memory of a GPU runs out, the CPU solves.

    Args:
        rows: (all images, D).
        train: (N,) int64, the training images.
        labels: (N,) int64 of the training images.
        test: (M,) int64, the images that are predicted.
        num_classes: K.
        device: device of the computation.
        groups: (N,) int64; training images of equal numbers are left out together. By default each is left
            out alone.

    Raises:
        InternalError: a feature is not finite.
    """

    def predict(place: torch.device) -> Tensor:
        targets = _to_signs(labels[None], num_classes)
        fit = _fit(standardise(rows, train, place), targets, groups)
        parts = torch.split(test, _BATCH)
        turned = (fit.directions.turn_others(part) @ fit.weights for part in parts)
        return torch.cat([decide(scores + fit.means).cpu() for scores in turned])

    return compute_where_it_fits(device, predict)


def solve_ridge(
    rows: Rows,
    indices: Tensor,
    numbers: Tensor,
    device: torch.device = _CPU,
    groups: Tensor | None = None,
) -> tuple[Tensor, Tensor, float]:
    """Return the weight (K, D) and bias (K,) float32 of ridge regression, and its penalty for each image.

    The bias is not penalised. The penalty is the one with the smallest squared error of the images left out.
    If the memory of a GPU runs out, the CPU solves.

    Args:
        rows: (all images, D).
        indices: (N,) int64, the training images; no others are read.
        numbers: (N, K), what to predict.
        device: device of the computation.
        groups: (N,) int64; images of equal numbers are left out together. By default each is left out alone.

    Raises:
        InternalError: a feature is not finite.
    """

    def solve(place: torch.device) -> tuple[Tensor, Tensor, float]:
        scaled = standardise(rows, indices, place)
        fit, number = _fit(scaled, numbers.double(), groups), len(numbers)
        parts = torch.split(torch.arange(number), _BATCH)
        fitted = torch.cat([fit.directions.turn(part) @ fit.weights for part in parts])
        duals = (fit.targets - fit.means - fitted) / (fit.penalty * number)  # Z w = Z Z' duals
        weight = scaled.mean.new_empty(numbers.shape[1], len(scaled.mean))
        for start, stop in scaled.blocks():
            weight[:, start:stop] = duals.T @ scaled.columns(start, stop) / scaled.std[start:stop]
        bias = fit.means - weight @ scaled.mean
        return weight.float().cpu(), bias.float().cpu(), fit.penalty

    return compute_where_it_fits(device, solve)


# --- the decomposition ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Directions:
    """The directions in which the training images differ.

    Attributes:
        squares: S^2 (R,).
        turn: returns T (B, R) of training images, by their places (B,).
        turn_others: returns the coordinates (B, R) of any images, by their indices (B,) into all rows.
        find_moments: returns T' y (R, C) of centred targets (N, C).
    """

    squares: Tensor
    turn: Turn
    turn_others: Turn
    find_moments: Turn


def _decompose(scaled: Standardised) -> _Directions:
    """Return the directions from the smaller of Z'Z and Z Z', Z being the features."""
    number, width, place = len(scaled.indices), len(scaled.mean), scaled.mean.device
    if width >= number:
        vectors, squares = scaled.directions()
        lengths = squares.sqrt()
        turned = vectors * lengths
        return _Directions(
            squares,
            lambda images: turned[images.to(place)],
            lambda images: _multiply(scaled, images) @ (vectors / lengths),
            lambda centred: turned.T @ centred,
        )
    parts = torch.split(torch.arange(number), _BATCH)
    products = scaled.mean.new_zeros(width, width)
    for images in parts:
        block = scaled.take(images)
        products += block.T @ block
    axes, squares = find_directions(products)

    def find_moments(centred: Tensor) -> Tensor:
        moments = [scaled.take(images).T @ centred[images.to(place)] for images in parts]
        return axes.T @ torch.stack(moments).sum(dim=0)

    return _Directions(
        squares,
        lambda images: scaled.take(images) @ axes,
        lambda images: scaled.take_others(images) @ axes,
        find_moments,
    )


def _multiply(scaled: Standardised, images: Tensor) -> Tensor:
    """Return the products (B, N) of any images with the training images, summed over blocks of features."""
    products = scaled.mean.new_zeros(len(images), len(scaled.indices))
    for start, stop in scaled.blocks():
        products += scaled.columns(start, stop, images) @ scaled.columns(start, stop).T
    return products


def _to_signs(labels: Tensor, num_classes: int) -> Tensor:
    """Return +1 for the class of an image and -1 for others, (N, P * K) float64, from labels (P, N)."""
    signs = torch.where(labels.T[..., None] == torch.arange(num_classes), 1.0, -1.0)
    return signs.flatten(1).double()


def _leave_out(directions: _Directions, targets: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return what is left out, for each penalty: squared errors (8, C), and predictions (8, N, C)."""
    number, place = len(targets), targets.device
    centred = targets - targets.mean(dim=0)
    moments = directions.find_moments(centred)
    errors = torch.zeros(len(PENALTIES), targets.shape[1], dtype=torch.float64)
    predicted = targets.new_empty(len(PENALTIES), *targets.shape)
    for members in _batch_groups(groups):
        own, there = directions.turn(members.flatten()).view(*members.shape, -1), members.to(place)
        for index, penalty in enumerate(PENALTIES):
            shares = 1 / (directions.squares + penalty * number)
            residuals = centred[there] - own @ (shares[:, None] * moments)
            hat = own * shares @ own.mT + 1 / number
            left_out = torch.linalg.solve(torch.eye(hat.shape[-1]).to(hat) - hat, residuals)
            errors[index] += left_out.square().sum(dim=(0, 1)).cpu()
            predicted[index, there.flatten()] = (targets[there] - left_out).flatten(0, 1)
    return errors, predicted


@dataclass(frozen=True, eq=False)
class _Fit:
    """Ridge regression with the penalty that is best for images left out.

    Attributes:
        directions: of the training images.
        targets: what is predicted, (N, C) float64.
        means: their means, (C,).
        penalty: for each training image.
        weights: of the coordinates, (R, C).
    """

    directions: _Directions
    targets: Tensor
    means: Tensor
    penalty: float
    weights: Tensor


def _fit(scaled: Standardised, targets: Tensor, groups: Tensor | None) -> _Fit:
    if groups is None or (groups == groups[0]).all():  # a single group cannot be left out
        groups = torch.arange(len(targets))
    directions, targets = _decompose(scaled), targets.to(scaled.mean.device)
    means = targets.mean(dim=0)
    penalty = PENALTIES[int(_leave_out(directions, targets, groups)[0].sum(dim=1).argmin())]
    moments = directions.find_moments(targets - means)
    weights = moments / (directions.squares + penalty * len(targets))[:, None]
    return _Fit(directions, targets, means, penalty, weights)


def _batch_groups(groups: Tensor) -> Iterator[Tensor]:
    """Yield the places of images, (G, L) int64: whole groups of one size, up to :data:`_BATCH` images."""
    _, numbers, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    by_group = numbers.argsort(stable=True)
    size_of = sizes[numbers[by_group]]
    for size in torch.unique(sizes).tolist():
        yield from torch.split(by_group[size_of == size].view(-1, size), max(1, _BATCH // size))
