"""Permutation tests whose permutations respect groups, and Holm's correction for several of them.

If a shortcut says nothing of the label, the labels of independent groups can be exchanged, and the accuracy
with the true labels is one among those with permuted labels. All images of a group keep one label, so the
permutations know as few independent facts as the data do (Winkler et al. 2015, "Multi-level block
permutation", doi:10.1016/j.neuroimage.2015.05.092).

Shape legend: N images, G groups, P permutations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Score = Callable[[Ints], Floats]
"""Returns the accuracy (P,) of each of P labellings (P, N)."""

LEVEL = 0.05
"""Probability of one false alarm or more over all tests together."""
MOST = 499
"""Permutations of a test: enough for an alarm among nine tests, and more take minutes."""
ENOUGH = 10
"""Permutations as accurate as the true labels after which a test ends: it is not significant (Besag and
Clifford 1991, doi:10.1093/biomet/78.2.301)."""
_FIRST = 20
"""Permutations of the first batch; many tests end there."""


class LabelPermuter:
    """Permutes the labels of groups of images.

    A group with one label exchanges it with a group of about its size (1, 2 to 3, 4 to 7, ... images), so
    that classes keep about their number of images. In a group with several labels, its images exchange them.

    Args:
        labels: (N,), the true labels.
        groups: (N,), equal for images of one group.
    """

    def __init__(self, labels: Ints, groups: Ints) -> None:
        self._labels = labels
        members = _split(groups)
        pure = [own for own in members if (labels[own] == labels[own[0]]).all()]
        self._mixed = [own for own in members if (labels[own] != labels[own[0]]).any()]
        sizes = np.array([len(own).bit_length() for own in pure], np.int64)
        self._strata = [[pure[place] for place in np.flatnonzero(sizes == size)] for size in np.unique(sizes)]

    @property
    def log_arrangements(self) -> float:
        """Natural logarithm of the number of different permutations."""
        alike = [self._labels[[own[0] for own in stratum]] for stratum in self._strata]
        return sum(_log_arrangements(labels) for labels in (*alike, *map(self._labels.take, self._mixed)))

    def draw(self, number: int, rng: np.random.Generator) -> Ints:
        """Return so many permutations of the labels, (P, N)."""
        drawn = np.tile(self._labels, (number, 1))
        for stratum in self._strata:
            firsts = self._labels[[own[0] for own in stratum]]
            order = rng.permuted(np.tile(firsts, (number, 1)), axis=1)
            places = np.concatenate(stratum)
            turns = np.repeat(np.arange(len(stratum)), [len(own) for own in stratum])
            drawn[:, places] = order[:, turns]
        for own in self._mixed:
            drawn[:, own] = rng.permuted(np.tile(self._labels[own], (number, 1)), axis=1)
        return drawn


def _split(groups: Ints) -> list[Ints]:
    """Return the places of the images of each group."""
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)


def _log_arrangements(labels: Ints) -> float:
    _, counts = np.unique(labels, return_counts=True)
    return math.lgamma(len(labels) + 1) - sum(math.lgamma(number + 1) for number in counts)


@dataclass(frozen=True)
class Permuted:
    """The result of a permutation test.

    Attributes:
        p: probability of such an accuracy, or a higher one, if the labels were permuted.
        chance: mean accuracy with permuted labels.
        high: their 95 % quantile.
        number: permutations that were drawn.
    """

    p: float
    chance: float
    high: float
    number: int


def permutation_test(
    accuracy: float, score: Score, permuter: LabelPermuter, rng: np.random.Generator, batch: int
) -> Permuted:
    """Test whether an accuracy is higher than with permuted labels.

    Args:
        accuracy: with the true labels.
        score: gives that of other labellings, by the same procedure.
        permuter: draws them.
        rng: random numbers.
        batch: labellings that are scored at a time.
    """
    scores: list[float] = []
    for size in _batches(batch):
        scores += score(permuter.draw(size, rng)).tolist()
        reached = np.cumsum(np.array(scores) >= accuracy - 1e-12)
        if reached[-1] >= ENOUGH:
            number = int(np.searchsorted(reached, ENOUGH)) + 1
            return _summarise(ENOUGH / number, scores)
    return _summarise((int(reached[-1]) + 1) / (MOST + 1), scores)


def _summarise(p: float, scores: Sequence[float]) -> Permuted:
    return Permuted(p, float(np.mean(scores)), float(np.quantile(scores, 0.95)), len(scores))


def _batches(batch: int) -> Iterator[int]:
    """Yield the sizes of batches, first a small one, with :data:`MOST` labellings in all."""
    size, left = min(batch, _FIRST), MOST
    while left:
        yield min(size, left)
        left -= min(size, left)
        size = batch


def adjust_holm(values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number: at most 5 % false alarms if those under 0.05 are alarms.

    The smallest of M values counts M-fold, the next one M - 1-fold, and so on, never less than the one
    before (Holm 1979).
    """
    adjusted, floor = [1.0] * len(values), 0.0
    for turn, place in enumerate(np.argsort(values, kind="stable").tolist()):
        floor = max(floor, min(1.0, (len(values) - turn) * values[place]))
        adjusted[place] = floor
    return adjusted
