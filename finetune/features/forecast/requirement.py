"""How many training images a target accuracy needs, or why that cannot be said."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from finetune.errors import UsageError
from finetune.features.forecast.extrapolation import LEVEL, MOST_TIMES, CurveSample, find_interval

MOST_WIDTH = 0.3
"""Widest interval of an accuracy that still says something: wider ones span 30 points."""
_NUM_SIZES = 400
_FIRST_SHARE = 0.05
"""Smallest number of images that is considered, as a share of N."""

Answer = Literal["reached", "images", "cannot say"]


@dataclass(frozen=True)
class Requirement:
    """The training images that a target accuracy needs.

    Attributes:
        target: the accuracy, in (0, 1).
        answer: ``reached``: with the images at hand; ``images``: with ``images``; ``cannot say``.
        images: the median over the fitted curves; None if it cannot be said.
        low: lower end of the 90 % interval; None if it cannot be said at all.
        high: its upper end; None if that lies beyond four times the images at hand.
        reason: why nothing can be said, else empty.
    """

    target: float
    answer: Answer
    images: int | None
    low: int | None
    high: int | None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self) | {"said": self.describe()}

    def describe(self) -> str:
        """Return the answer as one sentence."""
        asked = f"{100 * self.target:.4g} % accuracy"
        if self.answer == "cannot say":
            return f"{asked}: cannot say. {self.reason}"
        if self.answer == "reached":
            return f"{asked}: reached with the images at hand"
        assert self.images is not None and self.low is not None
        end = f"{_round(self.high):,}" if self.high else f"more than {MOST_TIMES} times those at hand"
        said = f"about {_round(self.images):,} images"
        return f"{asked}: {said} ({100 * LEVEL:.0f} % interval: {_round(self.low):,} to {end})"


def check_target(target: float) -> None:
    """Refuse a target that is no accuracy.

    Raises:
        UsageError: it is not between 0 and 1.
    """
    if not 0 < target < 1:
        fix = f"Write it as a share, such as {target / 100:g}." if 1 < target < 100 else "Try 0.95."
        raise UsageError(f"--target-accuracy {target:g}", "an accuracy lies between 0 and 1", fix)


def find_requirement(curves: CurveSample, target: float) -> Requirement:
    """Return how many training images a target accuracy needs.

    Nothing is said where the target lies above the interval of the accuracy with any number of images, where
    the interval at four times the images is wider than :data:`MOST_WIDTH`, and where more than four times the
    images are needed more probably than not: forecasts were not tested further.

    Args:
        curves: the fitted curves.
        target: the accuracy, in (0, 1).
    """
    number = curves.num_images
    _, least, most = find_interval(curves.limits())
    needed = _find_needed(curves, target)
    low, middle, high = np.quantile(needed, ((1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2), method="higher")
    _, end_low, end_high = find_interval(curves.accuracies(MOST_TIMES * number))
    furthest = MOST_TIMES * number
    if high <= number:
        return Requirement(target, "reached", None, None, None)
    bound: int | None = int(low) if low <= furthest else furthest
    if target > most:
        ends = f"between {_percent(least)} and {_percent(most)}"
        reason, bound = f"No number of images reaches it: the curve ends {ends}.", None
    elif end_high - end_low > MOST_WIDTH:
        width = f"between {_percent(end_low)} and {_percent(end_high)} with {furthest:,} images"
        reason = f"The forecast is too uncertain: {width}. Add images first."
    elif low > furthest:
        reason = f"More than {furthest:,} images, where forecasts end."
    elif middle > furthest:
        least_images = f"At least {_round(int(low)):,} images"
        reason = f"{least_images}, probably more than {furthest:,}, where forecasts end."
    else:
        last = int(high) if high <= furthest else None
        return Requirement(target, "images", int(middle), int(low), last)
    return Requirement(target, "cannot say", None, bound, None, reason)


def _find_needed(curves: CurveSample, target: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return the fewest images with which each curve reaches a target, (S,); infinity beyond the forecast."""
    sizes = curves.num_images * np.geomspace(_FIRST_SHARE, MOST_TIMES, _NUM_SIZES)
    needed = np.full(len(curves.errors), np.inf)
    for size in reversed(np.ceil(sizes)):
        needed[curves.accuracies(size) >= target] = size
    return needed


def _round(number: int) -> int:
    """Return a number with two significant digits: more would look more certain than it is."""
    return round(number, 2 - len(str(number)))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
