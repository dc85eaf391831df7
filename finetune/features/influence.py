"""Which training images a solved classifier owes an answer to: the answer without each of them.

Without an image, the classifier is solved again, with the same C and the same standardisation. That is exact,
and takes too long for every training image. So the images to leave out are chosen by the first-order estimate
of what leaving them out changes (influence functions, Koh and Liang, arXiv:1703.04730): with the Hessian H of
the objective, removing image i changes the weights by C H^-1 times the gradient of its loss.

What is followed is the margin of an answer: the logit of the answer less that of another class.

Shape legend: N training images, R coordinates of an image with a 1 for the bias, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.features.solvers import TrainingRows
from finetune.targets import SINGLE, decide, to_probabilities

CANDIDATES = 16
"""Training images that are left out one by one, half of them for the answer and half against it."""
MOST_TOGETHER = 32
"""Most images that are left out together to change the answer."""
NUM_SOLVED = CANDIDATES + MOST_TOGETHER.bit_length()
"""Most solutions of an answer."""
_MOST_STEPS, _ENOUGH = 200, 1e-6
"""Of the conjugate gradients: most steps, and the residual at which they end, as a share of the first one."""


@dataclass(frozen=True)
class LeftOut:
    """What leaving out one training image changes.

    Attributes:
        image: its number among the training images.
        estimate: first-order estimate of the change of the margin.
        change: change of the margin, from solving again.
        answer: class that is predicted without the image.
    """

    image: int
    estimate: float
    change: float
    answer: int


@dataclass(frozen=True)
class Influence:
    """What an answer depends on.

    Attributes:
        margin: logit of the answer less that of the other class.
        single: the images that were left out one by one; first those without which the margin falls most.
        together: the images with the lowest estimates, 1, 2, 4 or so on of them, without which the answer is
            another one; empty if :data:`MOST_TOGETHER` are not enough.
    """

    margin: float
    single: tuple[LeftOut, ...]
    together: tuple[int, ...]


class InfluenceSolver:
    """Leaves training images out of a softmax classifier.

    Args:
        training: the training images, with one class each.
        strength: C of the classifier.
    """

    def __init__(self, training: TrainingRows, strength: float) -> None:
        self.training, self.strength = training, strength
        self.weights = training.minimize(SINGLE.solver, strength)
        scores = training.matrix @ self.weights.T
        self._probabilities = to_probabilities(scores)
        truth = torch.nn.functional.one_hot(training.labels, training.num_classes)
        self._slopes = self._probabilities - truth.to(scores)

    def explain(
        self, row: Tensor, answer: int, other: int, advance: Callable[[int], None] = lambda _: None
    ) -> Influence:
        """Return what the answer to an image depends on.

        Args:
            row: coordinates of the image (R,), as :meth:`TrainingRows.project` gives them.
            answer: the class that is predicted.
            other: the class that it is compared with: the true one, or the second most probable.
            advance: called with numbers of solutions, :data:`NUM_SOLVED` in all.
        """
        scores = self.weights @ row
        margin = float(scores[answer] - scores[other])
        estimates = self.estimate(row, answer, other)
        order = estimates.argsort(stable=True)
        half = min(CANDIDATES // 2, len(order) // 2)
        chosen = [*order[:half].tolist(), *order[len(order) - half :].tolist()]
        single = []
        for image in chosen:
            weights = self._solve_without([image])
            if weights is not None:
                scores = weights @ row
                change = float(scores[answer] - scores[other]) - margin
                single.append(LeftOut(image, float(estimates[image]), change, _decide(scores)))
            advance(1)
        single.sort(key=lambda one: one.change)
        together = self._find_together(order, row, answer)
        advance(NUM_SOLVED - len(chosen))
        return Influence(margin, tuple(single), together)

    def estimate(self, row: Tensor, answer: int, other: int) -> Tensor:
        """Return the first-order change of the margin without each training image, (N,) float32."""
        direction = torch.zeros_like(self.weights)
        direction[answer] += row
        direction[other] -= row
        solved = self._solve_hessian(direction)
        return self.strength * (self._slopes * (self.training.matrix @ solved.T)).sum(dim=1)

    def _solve_hessian(self, target: Tensor) -> Tensor:
        """Return H^-1 of a direction (K, R) by conjugate gradients."""
        found, residual = torch.zeros_like(target), target.clone()
        direction, size = residual.clone(), residual.square().sum()
        least = _ENOUGH**2 * size
        for _ in range(_MOST_STEPS):
            bent = self._apply_hessian(direction)
            step = size / (direction * bent).sum()
            found += step * direction
            residual -= step * bent
            before, size = size, residual.square().sum()
            if size <= least:
                break
            direction = residual + size / before * direction
        return found

    def _apply_hessian(self, direction: Tensor) -> Tensor:
        """Return H times a direction (K, R); the bias, the last column, is not penalised."""
        change = self.training.matrix @ direction.T
        likely = self._probabilities
        bent = likely * (change - (likely * change).sum(dim=1, keepdim=True))
        penalty = direction.clone()
        penalty[:, -1] = 0
        return self.strength * bent.T @ self.training.matrix + penalty

    def _solve_without(self, images: Sequence[int]) -> Tensor | None:
        """Return the weights without some images; None if a class has no other image."""
        kept = torch.ones(len(self.training.labels), dtype=torch.bool, device=self.training.labels.device)
        kept[list(images)] = False
        part = self.training.select(kept)
        if (part.labels.bincount(minlength=self.training.num_classes) == 0).any():
            return None
        return part.minimize(SINGLE.solver, self.strength, weights=self.weights)

    def _find_together(self, order: Tensor, row: Tensor, answer: int) -> tuple[int, ...]:
        number = 1
        while number <= min(MOST_TOGETHER, len(order) - 1):
            images = order[:number].tolist()
            weights = self._solve_without(images)
            if weights is None:
                break
            if _decide(weights @ row) != answer:
                return tuple(images)
            number *= 2
        return ()


def _decide(scores: Tensor) -> int:
    return int(decide(scores[None]))
