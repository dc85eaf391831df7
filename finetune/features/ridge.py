"""Ridge regression on features, and what it predicts for images that are left out, without solving again.

With T = U S the standardised features in their principal directions, and y the labels as +1 and -1, the fit
of a penalty p is H y with H = T (S^2 + p)^-1 T' + 1 / N. Leaving a group G of images out multiplies the
residuals of its images by (1 - H_GG)^-1 (for a single image: Allen's PRESS). So one decomposition gives the
errors of all images left out, for every penalty, exactly, where a cross-validation solves for every fold.

Shape legend: N training images, D features, R directions in which the images differ, K classes, B images,
G groups of L images each, P labellings.
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
"""Returns T (B, R) float64 of images (B,); or the moments T' y (R, K) of labels y (N, K)."""


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
        self._num_classes, self._number = num_classes, len(indices)
        self._squares, self._turn, self._find_moments = _decompose(standardise(rows, indices, device))

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
        place, shape = self._squares.device, (len(labels), self._num_classes)
        targets = torch.where(labels.T[..., None] == torch.arange(self._num_classes), 1.0, -1.0)
        targets = targets.flatten(1).double().to(place)  # (N, P * K)
        centred = targets - targets.mean(dim=0)
        moments = self._find_moments(centred)
        errors = torch.zeros(len(PENALTIES), len(labels), dtype=torch.float64)
        hits = torch.zeros(len(PENALTIES), *labels.shape, dtype=torch.bool)
        for members in _batch_groups(groups):
            own, there = self._turn(members.flatten()).view(*members.shape, -1), members.to(place)
            for index, penalty in enumerate(PENALTIES):
                shares = 1 / (self._squares + penalty * self._number)
                residuals = centred[there] - own @ (shares[:, None] * moments)
                hat = own * shares @ own.mT + 1 / self._number
                left_out = torch.linalg.solve(torch.eye(hat.shape[-1]).to(hat) - hat, residuals)
                errors[index] += left_out.square().sum(dim=(0, 1)).view(shape).sum(dim=1).cpu()
                scores = (targets[there] - left_out).view(-1, self._num_classes)
                predicted = decide(scores).view(-1, len(labels)).T.cpu()
                hits[index, :, members.flatten()] = predicted == labels[:, members.flatten()]
        return hits[errors.argmin(dim=0), torch.arange(len(labels))]


def _decompose(scaled: Standardised) -> tuple[Tensor, Turn, Turn]:
    """Return S^2 (R,), what computes T, and what computes T' y; from the smaller of Z'Z and Z Z'."""
    number, width = len(scaled.indices), len(scaled.mean)
    if width >= number:
        vectors, squares = scaled.directions()
        turned = vectors * squares.sqrt()
        return squares, lambda images: turned[images.to(turned.device)], lambda centred: turned.T @ centred
    parts = torch.split(torch.arange(number), _BATCH)
    products = scaled.mean.new_zeros(width, width)
    for images in parts:
        block = scaled.take(images)
        products += block.T @ block
    axes, squares = find_directions(products)

    def find_moments(centred: Tensor) -> Tensor:
        moments = [scaled.take(images).T @ centred[images.to(centred.device)] for images in parts]
        return axes.T @ torch.stack(moments).sum(dim=0)

    return squares, lambda images: scaled.take(images) @ axes, find_moments


def _batch_groups(groups: Tensor) -> Iterator[Tensor]:
    """Yield the places of images, (G, L) int64: whole groups of one size, up to :data:`_BATCH` images."""
    _, numbers, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    by_group = numbers.argsort(stable=True)
    size_of = sizes[numbers[by_group]]
    for size in torch.unique(sizes).tolist():
        yield from torch.split(by_group[size_of == size].view(-1, size), max(1, _BATCH // size))
