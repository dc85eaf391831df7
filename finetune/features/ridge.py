"""Ridge regression on features, and what it predicts for images that are left out, without solving again.

With T = U S the standardised features in their principal directions, and y the labels as +1 and -1, the fit
of a penalty p is H y with H = T (S^2 + p)^-1 T' + 1 / N. Leaving a group G of images out multiplies the
residuals of its images by (1 - H_GG)^-1 (for a single image: Allen's PRESS). So one decomposition gives the
errors of all images left out, for every penalty, exactly, where a cross-validation solves for every fold.

Shape legend: N training images, D features, R directions in which the images differ, K classes, B images,
G groups of L images each, M images that are predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.features.rows import Rows
from finetune.features.standardised import Standardised, find_directions, standardise
from finetune.system.forward import compute_where_it_fits
from finetune.targets import decide

PENALTIES = tuple(10.0**power for power in range(-4, 4))
"""Penalties for each training image; a feature's own square is 1 for each."""
_BATCH = 2**10
"""Images whose features are in memory at once, in float64."""
_CPU = torch.device("cpu")

Turn = Callable[[Tensor], Tensor]
"""Returns coordinates (B, R) float64 in the principal directions of the training images."""


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
    if (groups == groups[0]).all():
        return torch.zeros(len(labels), dtype=torch.bool)

    def leave_out_on(place: torch.device) -> Tensor:
        signs = _to_signs(labels, num_classes).to(place)
        errors, left_out = _leave_out(_fit(standardise(rows, indices, place), signs), groups)
        return decide(left_out[errors.argmin()]).cpu() == labels

    return compute_where_it_fits(device, leave_out_on)


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
    if groups is None or (groups == groups[0]).all():  # a single group cannot be left out
        groups = torch.arange(len(labels))
    return compute_where_it_fits(
        device, lambda place: _predict(standardise(rows, train, place), labels, test, num_classes, groups)
    )


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
    if groups is None or (groups == groups[0]).all():  # a single group cannot be left out
        groups = torch.arange(len(numbers))
    return compute_where_it_fits(
        device, lambda place: _solve(standardise(rows, indices, place), numbers.double(), groups)
    )


def _solve(scaled: Standardised, numbers: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, float]:
    fit, number = _fit(scaled, numbers.to(scaled.mean.device)), len(numbers)
    penalty = PENALTIES[_leave_out(fit, groups)[0].argmin()]
    weights = fit.moments / (fit.squares + penalty * number)[:, None]
    parts = torch.split(torch.arange(number), _BATCH)
    residuals = fit.targets - fit.means - torch.cat([fit.turn(part) @ weights for part in parts])
    duals = residuals / (penalty * number)  # the weights of the features are Z' (y - Z w) / penalty
    weight = scaled.mean.new_empty(numbers.shape[1], len(scaled.mean))
    for start, stop in scaled.blocks():
        weight[:, start:stop] = duals.T @ scaled.columns(start, stop) / scaled.std[start:stop]
    bias = fit.means - weight @ scaled.mean
    return weight.float().cpu(), bias.float().cpu(), penalty


def _predict(scaled: Standardised, labels: Tensor, test: Tensor, num_classes: int, groups: Tensor) -> Tensor:
    fit = _fit(scaled, _to_signs(labels, num_classes).to(scaled.mean.device))
    penalty = PENALTIES[_leave_out(fit, groups)[0].argmin()]
    weights = fit.moments / (fit.squares + penalty * len(labels))[:, None]
    parts = torch.split(test, _BATCH)
    return torch.cat([decide(fit.turn_others(part) @ weights + fit.means).cpu() for part in parts])


@dataclass(frozen=True, eq=False)
class _Fit:
    """Ridge regression for every penalty.

    Attributes:
        targets: what is predicted, (N, K) float64.
        means: their means, (K,).
        squares: S^2 (R,).
        moments: T' y of the centred targets, (R, K).
        turn: returns T (B, R) of training images, by their places (B,).
        turn_others: returns the coordinates (B, R) of any images, by their indices (B,) into all rows.
    """

    targets: Tensor
    means: Tensor
    squares: Tensor
    moments: Tensor
    turn: Turn
    turn_others: Turn


def _to_signs(labels: Tensor, num_classes: int) -> Tensor:
    """Return +1 for the class of an image and -1 for others, (N, K) float64."""
    return torch.where(labels[:, None] == torch.arange(num_classes), 1.0, -1.0).double()


def _leave_out(fit: _Fit, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared error left out of each penalty, (P,), and its predictions left out, (P, N, K)."""
    number = len(fit.targets)
    centred = fit.targets - fit.means
    errors = torch.zeros(len(PENALTIES), dtype=torch.float64)
    predicted = fit.targets.new_empty(len(PENALTIES), *fit.targets.shape)
    for members in _batch_groups(groups):
        own = fit.turn(members.flatten()).view(*members.shape, -1)
        there = members.to(centred.device)
        for index, penalty in enumerate(PENALTIES):
            shares = 1 / (fit.squares + penalty * number)
            residuals = centred[there] - own @ (shares[:, None] * fit.moments)
            hat = own * shares @ own.mT + 1 / number
            left_out = torch.linalg.solve(torch.eye(hat.shape[-1]).to(hat) - hat, residuals)
            errors[index] += left_out.square().sum().item()
            predicted[index, there.flatten()] = (fit.targets[there] - left_out).flatten(0, 1)
    return errors, predicted


def _fit(scaled: Standardised, targets: Tensor) -> _Fit:
    """Return the fit from the smaller of Z'Z and Z Z', Z being the features."""
    number, width, place = len(targets), len(scaled.mean), scaled.mean.device
    means = targets.mean(dim=0)
    centred = targets - means
    if width >= number:
        vectors, squares = scaled.directions()
        lengths = squares.sqrt()
        turned = vectors * lengths
        return _Fit(
            targets,
            means,
            squares,
            turned.T @ centred,
            lambda images: turned[images.to(place)],
            lambda images: _multiply(scaled, images) @ (vectors / lengths),
        )
    products, moments = centred.new_zeros(width, width), centred.new_zeros(width, centred.shape[1])
    for images in torch.split(torch.arange(number), _BATCH):
        block = scaled.take(images)
        products += block.T @ block
        moments += block.T @ centred[images.to(place)]
    axes, squares = find_directions(products)
    return _Fit(
        targets,
        means,
        squares,
        axes.T @ moments,
        lambda images: scaled.take(images) @ axes,
        lambda images: scaled.take_others(images) @ axes,
    )


def _multiply(scaled: Standardised, images: Tensor) -> Tensor:
    """Return the products (B, N) of any images with the training images, summed over blocks of features."""
    products = scaled.mean.new_zeros(len(images), len(scaled.indices))
    for start, stop in scaled.blocks():
        products += scaled.columns(start, stop, images) @ scaled.columns(start, stop).T
    return products


def _batch_groups(groups: Tensor) -> Iterator[Tensor]:
    """Yield the places of images, (G, L) int64: whole groups of one size, up to :data:`_BATCH` images."""
    _, numbers, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    by_group = numbers.argsort(stable=True)
    size_of = sizes[numbers[by_group]]
    for size in torch.unique(sizes).tolist():
        yield from torch.split(by_group[size_of == size].view(-1, size), max(1, _BATCH // size))
