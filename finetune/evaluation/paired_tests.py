"""Whether one classifier is better than another: a paired test on the images that both predicted.

McNemar's exact test (1947): under the null hypothesis, an image that only one of the two classifiers gets
right is equally likely to be right for the first or for the second. The two-sided p-value is twice the
smaller tail of that binomial distribution, at most 1; the mid-p value is not used, since it may be too small.

The interval of the difference is Tango's score interval for paired proportions (Statistics in Medicine 17,
1998, 891-908): all differences that the score test does not reject. Unlike a bootstrap interval, it is not
empty if both classifiers are right on the same images, which shows only that they seldom differ. Several
pairs are corrected by Holm's method (1979).

Shape legend: N images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

SIGNIFICANCE = 0.05
_QUANTILE = 1.959963984540054
"""Quantile of the standard normal distribution with 2.5 % beyond it on either side."""
_HALVINGS = 60
"""Bisections of a range of at most 2, after which it is below the resolution of float64."""

Rights = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class PairedTest:
    """How two classifiers differ on the same images. Accuracies and their difference are fractions.

    Attributes:
        first: name of the first classifier.
        second: name of the second classifier.
        num_images: number of images that both predicted.
        only_first: number of images that only the first got right.
        only_second: number of images that only the second got right.
        first_accuracy: accuracy of the first on these images.
        second_accuracy: accuracy of the second on these images.
        interval: 95 % interval of the difference, of this pair alone.
        p_value: p-value of McNemar's exact test of this pair alone.
        p_corrected: p-value corrected for the number of compared pairs (Holm).
        num_pairs: number of compared pairs.
    """

    first: str
    second: str
    num_images: int
    only_first: int
    only_second: int
    first_accuracy: float
    second_accuracy: float
    interval: tuple[float, float]
    p_value: float
    p_corrected: float
    num_pairs: int = 1

    @property
    def difference(self) -> float:
        """Accuracy of the second minus that of the first, in [-1, 1]."""
        return (self.only_second - self.only_first) / self.num_images

    @property
    def is_claimed(self) -> bool:
        """Whether a difference may be claimed: the corrected p-value is small, the interval excludes 0."""
        return may_claim(self.p_corrected, self.interval)

    @property
    def sentence(self) -> str:
        """The result as a sentence."""
        said = describe_p("McNemar", self.p_value, self.p_corrected, self.num_pairs)
        names = self.first, self.second
        return describe_difference(names, self.difference, self.interval, self.is_claimed, said)


def describe_difference(
    names: tuple[str, str],
    difference: float,
    interval: tuple[float, float],
    is_claimed: bool,
    said: str,
    unit: str = "",
) -> str:
    """Return a sentence about the difference of two runs.

    Args:
        names: names of the first and the second run.
        difference: score of the second minus that of the first.
        interval: its 95 % interval.
        is_claimed: whether the difference may be claimed.
        said: what is said of its p-value.
        unit: what points are of, after a space.
    """
    (first, second), points, (low, high) = names, difference, interval
    if points < 0:
        first, second, points, low, high = second, first, -points, -high, -low
    numbers = f"95 % interval {100 * low:.1f} to {100 * high:.1f}; {said}"
    if is_claimed:
        return f"{second} is better than {first} by {100 * points:.1f} points{unit} ({numbers})"
    has = f"{second} has {100 * points:.1f} points{unit} more" if points else "they are equal"
    return f"no difference can be claimed between {names[0]} and {names[1]} ({has}; {numbers})"


def format_p(p_value: float) -> str:
    """Return a p-value with two digits."""
    return "p < 0.0001" if p_value < 1e-4 else f"p = {p_value:.2g}"


def compare_pairs(rights: Sequence[tuple[str, Rights, str, Rights]]) -> list[PairedTest]:
    """Compare pairs of classifiers, with p-values corrected for the number of pairs.

    Args:
        rights: for each pair, the name of the first classifier and which images it got right (N,), then the
            same for the second, with the same images in the same order; N is at least 1.
    """
    alone = [_compare(*pair) for pair in rights]
    corrected = correct_holm([pair.p_value for pair in alone])
    return [
        replace(pair, p_corrected=p_value, num_pairs=len(alone))
        for pair, p_value in zip(alone, corrected, strict=True)
    ]


def may_claim(p_corrected: float, interval: tuple[float, float]) -> bool:
    """Return whether a difference may be claimed: its p-value is small, and its interval excludes 0."""
    low, high = interval
    return p_corrected < SIGNIFICANCE and not low <= 0 <= high


def describe_p(test: str, p_value: float, p_corrected: float, num_pairs: int) -> str:
    """Return what is said of a p-value, alone and corrected for the number of pairs."""
    alone = f"{test} {format_p(p_value)}"
    if num_pairs == 1:
        return alone
    return f"{alone}, corrected for {num_pairs} comparisons {format_p(p_corrected)}"


def _compare(first: str, first_right: Rights, second: str, second_right: Rights) -> PairedTest:
    only_first = int((first_right & ~second_right).sum())
    only_second = int((second_right & ~first_right).sum())
    num_images = len(first_right)
    p_value = compute_mcnemar(only_first, only_second)
    return PairedTest(
        first,
        second,
        num_images,
        only_first,
        only_second,
        float(first_right.mean()),
        float(second_right.mean()),
        compute_interval(only_first, only_second, num_images),
        p_value,
        p_value,
    )


def compute_mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p-value, from the numbers of images that only one classifier got right."""
    total, fewer = only_first + only_second, min(only_first, only_second)
    log_factorials = np.concatenate(([0.0], np.log(np.arange(1, total + 1)).cumsum()))
    tail = np.arange(fewer + 1)
    log_choices = log_factorials[total] - log_factorials[tail] - log_factorials[total - tail]
    return min(1.0, 2 * float(np.exp(log_choices - total * np.log(2)).sum()))


def compute_interval(only_first: int, only_second: int, num_images: int) -> tuple[float, float]:
    """Return Tango's 95 % interval of the second accuracy minus the first, in [-1, 1].

    Args:
        only_first: images that only the first got right.
        only_second: images that only the second got right.
        num_images: number of images that both predicted, at least one.
    """
    estimate = (only_second - only_first) / num_images
    low, high = (_find_limit(only_first, only_second, num_images, end) for end in (-1.0, 1.0))
    return min(low, estimate), max(high, estimate)


def _find_limit(only_first: int, only_second: int, num_images: int, end: float) -> float:
    """Return where, from the estimate towards an end of [-1, 1], the score test begins to reject."""
    kept, rejected = (only_second - only_first) / num_images, end
    for _ in range(_HALVINGS):
        middle = (kept + rejected) / 2
        if _is_rejected(middle, only_first, only_second, num_images):
            rejected = middle
        else:
            kept = middle
    return kept


def _is_rejected(difference: float, only_first: int, only_second: int, num_images: int) -> bool:
    """Return whether the score test rejects a true difference at 5 %.

    The variance is that of the maximum-likelihood proportions with this difference: the share of images that
    only the first gets right is then the larger root of a quadratic equation (Tango 1998).
    """
    linear = (2 * num_images + only_first - only_second) * difference - only_first - only_second
    constant = -only_first * difference * (1 - difference)
    root = math.sqrt(max(0.0, linear**2 - 8 * num_images * constant))
    share = (root - linear) / (4 * num_images)
    variance = num_images * (2 * share + difference * (1 - difference))
    return (only_second - only_first - num_images * difference) ** 2 > _QUANTILE**2 * variance


def correct_holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm-corrected p-values: at 5 %, the chance of any false claim among all of them is at most 5 %.

    The smallest of n p-values is multiplied by n, the next by n - 1 and so on. A corrected value is never
    smaller than the one before it, or larger than 1.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
