"""The optimum of a linear classifier by L-BFGS (Liu and Nocedal, 1989), specialised for linear classifiers.

The objective is that of scikit-learn; the bias is not penalised::

    C * sum of losses + ||W||^2 / 2

It is strictly convex in W, so the optimum is unique (for a softmax, up to a constant added to all biases) and
does not depend on the solver. Four things make this one fast:

- scores are linear in the weights: once the scores of a direction are known, a step of any length needs no
  further product with the rows. Newton's method finds the step length nearly exactly;
- one-vs-rest classifiers are K separate problems: each class has its own step length and L-BFGS memory, and
  they share only the matrix products;
- a preconditioner approximates the curvature (:class:`Spectrum`). It reduces the number of iterations and
  does not change the optimum;
- float32. An error of the gradient changes the objective by its square only: with a tolerance of 1e-8 it
  ended 2e-8 above that of float64, and products take half the time.

Shape legend: N rows of R features, the last of which is a 1 for the bias, K classes, M directions. A total
over a class's weights is (K, 1) where classes are separate problems, else (1, 1).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.targets import to_probabilities

MOST_STEPS = 1000
"""Largest number of steps; twenty to a hundred are usual."""
_MEMORY = 5
"""Steps that L-BFGS stores. With ten it needed 3 % fewer steps, with one 10 % more."""
_FLATTENED = 0.1
"""Largest share of the slope along a direction that remains after a line search (strong Wolfe condition)."""
_MOST_LENGTHS = 10
_PACE = 5
"""Number of steps from which the rate of convergence is estimated."""
_NUM_DIRECTIONS = 128
"""Directions of the spectrum. On SqueezeNet's features, all 2,048 hardly saved iterations; with none, there
were 50 % more."""
_NUM_POWERS = 2
_FLATTEST = 1e-4
"""Floor of a loss's mean curvature, as a share of the initial one."""
_TINY = 1e-30


class Loss(ABC):
    """A loss of scores (N, K).

    Args:
        signs: (N, K) float32, 1 for the true class of a row and -1 for others.

    Attributes:
        is_separable: whether it is a sum over classes, so that each class is a separate problem.
    """

    is_separable: bool

    def __init__(self, signs: Tensor) -> None:
        self.signs = signs

    @property
    def initial_curvature(self) -> float:
        """Mean second derivative by one score, at scores of zero."""
        return self.curvatures(torch.zeros_like(self.signs[:1])).mean().item()

    @abstractmethod
    def values(self, scores: Tensor) -> Tensor:
        """Return the loss of each row, summed over classes, (N,)."""

    @abstractmethod
    def slopes(self, scores: Tensor) -> Tensor:
        """Return first derivatives by each score, (N, K)."""

    @abstractmethod
    def curvatures(self, scores: Tensor) -> Tensor:
        """Return second derivatives by each score, (N, K)."""

    def bends(self, scores: Tensor, change: Tensor) -> Tensor:
        """Return the second derivative along a change (N, K) of scores: (K, 1), or (1, 1)."""
        return (self.curvatures(scores) * change.square()).sum(dim=0)[:, None]


class Softmax(Loss):
    """Cross entropy, in nats, of the softmax of all classes together (multinomial logistic regression)."""

    is_separable = False

    def values(self, scores: Tensor) -> Tensor:
        """Return -log p of the true class, (N,)."""
        return scores.logsumexp(dim=1) - (scores * (self.signs > 0)).sum(dim=1)

    def slopes(self, scores: Tensor) -> Tensor:
        """Return p - 1 for the true class and p for others, (N, K)."""
        return to_probabilities(scores) - (self.signs > 0).to(scores)

    def curvatures(self, scores: Tensor) -> Tensor:
        """Return p(1 - p), (N, K)."""
        likely = to_probabilities(scores)
        return likely * (1 - likely)

    def bends(self, scores: Tensor, change: Tensor) -> Tensor:
        """Return the sum of the variances of the change under p, (1, 1)."""
        likely = to_probabilities(scores)
        centred = change - (likely * change).sum(dim=1, keepdim=True)
        return (likely * centred.square()).sum().view(1, 1)


class SquaredHinge(Loss):
    """max(0, 1 - s)^2 of each class against the rest, as in scikit-learn's LinearSVC."""

    is_separable = True

    def values(self, scores: Tensor) -> Tensor:
        """Return sums over classes, (N,)."""
        return (1 - self.signs * scores).clamp_min(0).square().sum(dim=1)

    def slopes(self, scores: Tensor) -> Tensor:
        """Return -2 max(0, 1 - s), with the sign, (N, K)."""
        return -2 * self.signs * (1 - self.signs * scores).clamp_min(0)

    def curvatures(self, scores: Tensor) -> Tensor:
        """Return 2 within the margin and 0 outside, (N, K)."""
        return 2.0 * (self.signs * scores < 1).to(scores)


class Logistic(Loss):
    """log(1 + exp(-s)), in nats, of each class against the rest (binary logistic regressions)."""

    is_separable = True

    def values(self, scores: Tensor) -> Tensor:
        """Return sums over classes, (N,)."""
        return F.softplus(-self.signs * scores).sum(dim=1)

    def slopes(self, scores: Tensor) -> Tensor:
        """Return -sigmoid(-s), with the sign, (N, K)."""
        return -self.signs * (-self.signs * scores).sigmoid()

    def curvatures(self, scores: Tensor) -> Tensor:
        """Return p(1 - p), (N, K)."""
        likely = scores.sigmoid()
        return likely * (1 - likely)


@dataclass(frozen=True)
class Spectrum:
    """Approximate principal directions of the rows, for the preconditioner; they do not change the optimum.

    Attributes:
        directions: (R - 1, M), orthonormal; those of the largest energies.
        energies: (M,), mean squares of the rows along them.
        rest: mean square along any other direction.
    """

    directions: Tensor
    energies: Tensor
    rest: float


def measure_spectrum(rows: Tensor) -> Spectrum:
    """Return the spectrum of rows (N, R) by subspace iteration (arXiv:0909.4061).

    The bias's column is left out: it is at right angles to columns that have the mean zero.
    """
    rows = rows[:, :-1]
    num_directions = min(_NUM_DIRECTIONS, rows.shape[1], rows.shape[0])
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(rows.shape[1], num_directions, generator=generator)
    basis = torch.linalg.qr(start.to(rows)).Q
    for _ in range(_NUM_POWERS):
        basis = torch.linalg.qr(rows.T @ (rows @ basis)).Q
    images = rows @ basis
    squares, turn = torch.linalg.eigh(images.T @ images)
    energies = squares.clamp_min(0) / len(rows)
    others = rows.shape[1] - num_directions
    rest = (rows.square().sum() / len(rows) - energies.sum()).clamp_min(0) / max(1, others)
    return Spectrum(basis @ turn, energies, rest.item())


@dataclass(frozen=True)
class Objective:
    """What is minimised over weights (K, R).

    Attributes:
        rows: (N, R) float32.
        loss: of the scores of these rows.
        strength: C, positive.
        spectrum: of the rows, or of more rows that they are part of.
    """

    rows: Tensor
    loss: Loss
    strength: float
    spectrum: Spectrum

    def value(self, weights: Tensor, scores: Tensor) -> float:
        """Return the objective."""
        penalty = weights[:, :-1].square().sum() / 2
        return (self.strength * self.loss.values(scores).sum() + penalty).item()

    def gradient(self, weights: Tensor, scores: Tensor) -> Tensor:
        """Return derivatives by the weights, (K, R)."""
        gradient = (self.strength * self.loss.slopes(scores)).T @ self.rows
        gradient[:, :-1] += weights[:, :-1]
        return gradient

    def dot(self, one: Tensor, other: Tensor) -> Tensor:
        """Return inner products of (K, R) and (K, R), of each problem by itself: (K, 1), or (1, 1)."""
        if not self.loss.is_separable:
            return (one.flatten() @ other.flatten()).view(1, 1)
        products: Tensor = torch.linalg.vecdot(one, other)
        return products[:, None]

    def dot_scores(self, one: Tensor, other: Tensor) -> Tensor:
        """Return inner products of (N, K) and (N, K), of each problem by itself: (K, 1), or (1, 1)."""
        products: Tensor = torch.linalg.vecdot(one, other, dim=0)
        return products[:, None] if self.loss.is_separable else products.sum().view(1, 1)

    def build_preconditioner(self, scores: Tensor) -> Callable[[Tensor], Tensor]:
        """Return roughly the inverse of the Hessian, as if every row had its class's mean curvature."""
        curvature = self.loss.curvatures(scores).mean(dim=0)[:, None]
        floor = _FLATTEST * self.loss.initial_curvature
        bend = self.strength * len(self.rows) * curvature.clamp_min(floor)
        low = 1 / (1 + bend * self.spectrum.rest)
        extra = 1 / (1 + bend * self.spectrum.energies) - low
        directions = self.spectrum.directions

        def apply(gradient: Tensor) -> Tensor:
            inner = gradient[:, :-1]
            along = ((inner @ directions) * extra) @ directions.T
            return torch.cat([low * inner + along, gradient[:, -1:] / bend], dim=1)

        return apply


@contextmanager
def _full_float32() -> Iterator[None]:
    """Multiply float32 in float32: with TF32, which a calling program may allow, small gains are rounding."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@_full_float32()
def minimize(objective: Objective, tolerance: float, weights: Tensor | None = None) -> Tensor:
    """Return weights (K, R) at the optimum.

    Args:
        objective: what to minimise.
        tolerance: the relative error of the objective, estimated from the rate of convergence.
        weights: initial weights (K, R), which are not modified; zeros if None.
    """
    rows, num_classes = objective.rows, objective.loss.signs.shape[1]
    weights = rows.new_zeros(num_classes, rows.shape[1]) if weights is None else weights
    scores = rows @ weights.T
    gradient = objective.gradient(weights, scores)
    precondition = objective.build_preconditioner(scores)
    scaled = precondition(gradient)
    memory, gains = _Memory(objective), deque[float](maxlen=_PACE + 1)
    for _ in range(MOST_STEPS):
        direction = memory.turn(gradient, scaled).neg_()
        gains.append(-torch.linalg.vecdot(gradient, direction).sum().item() / 2)
        if _add_up(gains) <= tolerance * objective.value(weights, scores):
            break
        change = rows @ direction.T
        length = _find_length(objective, weights, scores, direction, change, gradient)
        step = length * direction
        weights, scores = weights + step, scores + length.T * change
        new = objective.gradient(weights, scores)
        new_scaled = precondition(new)
        memory.add(step, new - gradient, new_scaled - scaled)
        gradient, scaled = new, new_scaled
    return weights


def _add_up(gains: Sequence[float]) -> float:
    """Return the gain of all further steps, if gains keep shrinking at the rate of the last ones."""
    if len(gains) == 1 or gains[-1] <= 0:  # rounding alone makes a gain negative: nothing is left
        return gains[-1]
    pace = (gains[-1] / max(gains[0], _TINY)) ** (1 / (len(gains) - 1))
    return gains[-1] / (1 - pace) if pace < 1 else math.inf


def _find_length(
    objective: Objective, weights: Tensor, scores: Tensor, direction: Tensor, change: Tensor, gradient: Tensor
) -> Tensor:
    """Return step lengths (K, 1), or (1, 1), at which at most a tenth of the initial slope remains.

    The objective is convex, so the slope along a direction never decreases: if it is negative the step is too
    short, if it is positive too long. Newton's method is kept between these bounds.
    """
    loss, strength = objective.loss, objective.strength
    penalised = F.pad(direction[:, :-1], (0, 1))
    along, square = objective.dot(penalised, weights), objective.dot(penalised, direction)
    first = slope = objective.dot(gradient, direction)
    length, here = torch.zeros_like(slope), scores
    too_short = torch.zeros_like(slope)
    # Near the minimum, rounding can make a direction point upwards: then the length stays zero.
    too_long = torch.where(first < 0, torch.inf, 0.0)
    for _ in range(_MOST_LENGTHS):
        bend = strength * loss.bends(here, change) + square
        newton = length - slope / bend.clamp_min(_TINY)
        between = torch.where(too_long.isinf(), 2 * length + 1, (too_short + too_long) / 2)
        inside = (newton > too_short) & (newton < too_long)
        is_found = (slope.abs() <= _FLATTENED * first.abs()) & (length > 0)
        length = torch.where(is_found, length, torch.where(inside, newton, between))
        here = scores + length.T * change
        slope = strength * objective.dot_scores(loss.slopes(here), change) + along + length * square
        too_short = torch.where(slope < 0, length, too_short)
        too_long = torch.where(slope > 0, length, too_long)
        if (slope.abs() <= _FLATTENED * first.abs()).all():
            break
    return length


class _Pair(NamedTuple):
    """A stored step of L-BFGS: tensors (K, R), and one number per problem, (K, 1) or (1, 1)."""

    step: Tensor
    change: Tensor
    scaled: Tensor
    inverse: Tensor
    scale: Tensor


class _Memory:
    """The last steps and their changes of the gradient, from which L-BFGS approximates the inverse Hessian.

    The preconditioner is linear, so a preconditioned change of the gradient is the difference of two
    preconditioned gradients. So it is applied only once per step.
    """

    def __init__(self, objective: Objective) -> None:
        self._dot = objective.dot
        self._pairs: deque[_Pair] = deque(maxlen=_MEMORY)

    def add(self, step: Tensor, change: Tensor, scaled: Tensor) -> None:
        """Store a step (K, R), its change of the gradient, and that of the preconditioned gradient."""
        product, norm = self._dot(step, change), self._dot(change, scaled)
        # A class whose weights did not change gives no curvature.
        inverse = torch.where(product > _TINY, 1 / product.clamp_min(_TINY), 0.0)
        scale = torch.where(norm > _TINY, product / norm.clamp_min(_TINY), 1.0)
        self._pairs.append(_Pair(step, change, scaled, inverse, scale))

    def turn(self, gradient: Tensor, scaled: Tensor) -> Tensor:
        """Return the approximate inverse Hessian times the gradient, (K, R): the two loops of L-BFGS."""
        gradient, scaled = gradient.clone(), scaled.clone()
        shares = []
        for pair in reversed(self._pairs):
            share = pair.inverse * self._dot(pair.step, gradient)
            gradient.addcmul_(pair.change, share, value=-1)
            scaled.addcmul_(pair.scaled, share, value=-1)
            shares.append(share)
        if self._pairs:
            scaled *= self._pairs[-1].scale
        for pair, share in zip(self._pairs, reversed(shares), strict=True):
            scaled.addcmul_(pair.step, share - pair.inverse * self._dot(pair.change, scaled))
        return scaled
