"""Ridge regression on features, and what it predicts for images that are left out, without solving again.

With T = U S the standardised features in their principal directions, and y the labels as +1 and -1, the fit
of a penalty p is H y with H = T (S^2 + p)^-1 T' + 1 / N. Leaving a group G of images out multiplies the
residuals of its images by (1 - H_GG)^-1 (for a single image: Allen's PRESS). So one decomposition gives the
errors of all images left out, for every penalty, exactly, where a cross-validation solves for every fold.

Shape legend: N training images, D features, R directions in which the images differ, K classes, B images,
G groups of L images each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

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
"""Returns T (B, R) float64 of images (B,)."""


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
    return compute_where_it_fits(
        device, lambda place: _leave_out(standardise(rows, indices, place), labels, num_classes, groups)
    )


def solve_ridge(
    rows: Rows,
    indices: Tensor,
    numbers: Tensor,
    device: torch.device = _CPU,
    groups: Tensor | None = None,
) -> tuple[Tensor, Tensor, float]:
    """Return the weight (T, D) and bias (T,) float32 of ridge regression, and the penalty for each image.

    The bias is not penalised. The penalty is the one with the smallest squared error of the groups left out.

    Args:
        rows: (all images, D).
        indices: (N,) int64, the training images; no others are read.
        numbers: (N, T), what to predict.
        device: device of the computation.
        groups: (N,) int64; images of equal numbers are left out together. By default each is left out alone.

    Raises:
        InternalError: a feature is not finite.
    """
    groups = torch.arange(len(numbers)) if groups is None else groups
    return compute_where_it_fits(
        device, lambda place: _solve(standardise(rows, indices, place), numbers.double(), groups)
    )


def _solve(scaled: Standardised, numbers: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, float]:
    number, middle = len(numbers), numbers.mean(dim=0).to(scaled.mean.device)
    centred = numbers.to(scaled.mean.device) - middle
    squares, moments, turn = _decompose(scaled, centred)
    errors = _sum_errors(centred, squares, moments, turn, groups)
    penalty = PENALTIES[int(errors.argmin())]
    fitted = torch.cat(
        [turn(images) @ (moments / (squares + penalty * number)[:, None]) for images in _split(number)]
    )
    duals = (centred - fitted) / (penalty * number)  # the weights are Z' (y - Z w) / penalty
    weight = scaled.mean.new_empty(numbers.shape[1], len(scaled.mean))
    for start, stop in scaled.blocks():
        weight[:, start:stop] = duals.T @ scaled.columns(start, stop) / scaled.std[start:stop]
    bias = middle - weight @ scaled.mean
    return weight.float().cpu(), bias.float().cpu(), penalty


def _sum_errors(centred: Tensor, squares: Tensor, moments: Tensor, turn: Turn, groups: Tensor) -> Tensor:
    """Return the sum of squared errors of the groups left out, for each penalty, (P,)."""
    number = len(centred)
    errors = torch.zeros(len(PENALTIES), dtype=torch.float64)
    if (groups == groups[0]).all():  # none can be left out: the largest penalty is the safest
        return -torch.arange(len(PENALTIES), dtype=torch.float64)
    for members in _batch_groups(groups):
        own, there = turn(members.flatten()).view(*members.shape, -1), members.to(centred.device)
        for index, penalty in enumerate(PENALTIES):
            left_out = _residuals(own, centred[there], squares + penalty * number, moments, number)
            errors[index] += left_out.square().sum().item()
    return errors


def _residuals(own: Tensor, centred: Tensor, penalised: Tensor, moments: Tensor, number: int) -> Tensor:
    """Return the residuals (G, L, K) of groups that are left out, from their directions (G, L, R)."""
    shares = 1 / penalised
    residuals = centred - own @ (shares[:, None] * moments)
    hat = own * shares @ own.mT + 1 / number
    left_out: Tensor = torch.linalg.solve(torch.eye(hat.shape[-1]).to(hat) - hat, residuals)
    return left_out


def _split(number: int) -> tuple[Tensor, ...]:
    return torch.split(torch.arange(number), _BATCH)


def _leave_out(scaled: Standardised, labels: Tensor, num_classes: int, groups: Tensor) -> Tensor:
    number, place = len(labels), scaled.mean.device
    targets = torch.where(labels[:, None] == torch.arange(num_classes), 1.0, -1.0).double().to(place)
    centred = targets - targets.mean(dim=0)
    squares, moments, turn = _decompose(scaled, centred)
    errors = torch.zeros(len(PENALTIES), dtype=torch.float64)
    hits = torch.zeros(len(PENALTIES), number, dtype=torch.bool)
    for members in _batch_groups(groups):
        own, there = turn(members.flatten()).view(*members.shape, -1), members.to(place)
        for index, penalty in enumerate(PENALTIES):
            left_out = _residuals(own, centred[there], squares + penalty * number, moments, number)
            errors[index] += left_out.square().sum().item()
            predicted = decide((targets[there] - left_out).flatten(0, 1)).cpu()
            hits[index, members.flatten()] = predicted == labels[members.flatten()]
    return hits[errors.argmin()]


def _decompose(scaled: Standardised, centred: Tensor) -> tuple[Tensor, Tensor, Turn]:
    """Return S^2 (R,), the moments T' y (R, K), and what computes T, from the smaller of Z'Z and Z Z'."""
    number, width = len(centred), len(scaled.mean)
    if width >= number:
        vectors, squares = scaled.directions()
        turned = vectors * squares.sqrt()
        return squares, turned.T @ centred, lambda images: turned[images.to(turned.device)]
    products, moments = centred.new_zeros(width, width), centred.new_zeros(width, centred.shape[1])
    for images in _split(number):
        block = scaled.take(images)
        products += block.T @ block
        moments += block.T @ centred[images.to(centred.device)]
    axes, squares = find_directions(products)
    return squares, axes.T @ moments, lambda images: scaled.take(images) @ axes


def _batch_groups(groups: Tensor) -> Iterator[Tensor]:
    """Yield the places of images, (G, L) int64: whole groups of one size, up to :data:`_BATCH` images."""
    _, numbers, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    by_group = numbers.argsort(stable=True)
    size_of = sizes[numbers[by_group]]
    for size in torch.unique(sizes).tolist():
        yield from torch.split(by_group[size_of == size].view(-1, size), max(1, _BATCH // size))
