"""A power law with a floor, fitted to a learning curve and extrapolated, as a weighted sample of curves.

The error on n training images is ``e(n) = E (s + (1 - s) ((n + d) / (N + d))^-b)``: E is the error on all N
images, s the share of it that no number of images removes, b the exponent, and d lets the fall begin late.
That is the power law with a floor (arXiv:1712.00409, arXiv:2010.11029), and with d the form "pow4" of the
learning curve database (Mohr et al., ECML PKDD 2022), one of the two that extrapolated best there. No form
can be told from few points: those that fit equally well give very different curves (arXiv:2207.01725). So
none is chosen. Every combination of s, b and d on a grid is weighted by how well it fits the measured points,
whose noise is known, and by a prior; E is integrated exactly. What is far from the measured points is then as
uncertain as the forms that fit disagree.

A last term stands for what no form of the family has: the logarithm of the error is off by ``MISFIT`` for
each doubling beyond N. It and the prior were set before any forecast was compared with the truth; ``SLACK``
was chosen on half of the data sets (docs/forecast.md).

Shape legend: P measured points, G combinations of the grid, S sampled curves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np

from finetune.features.forecast.learning_curve import Floats, LearningCurve

LEVEL = 0.9
"""Level of all intervals."""
NUM_CURVES = 4_000
MISFIT = 0.05
"""Standard deviation of the logarithm of the error, for each doubling beyond the measured images."""
SLACK = 2.0
"""Factor of the covariance of the measured points. Of 1, 1.25, 1.5, 1.75, 2 and 2.5 it is the smallest with
which 90 % of the intervals held the truth, on 108 draws of three data sets; with 1, 82 % did."""
MOST_TIMES = 4
"""Multiple of N up to which forecasts were compared with the truth (docs/forecast.md)."""
_FLOORS = np.linspace(0.0, 0.995, 200)
_EXPONENTS = np.geomspace(0.1, 2.5, 60)
_SHIFTS = (0.0, 0.05, 0.2)
"""As shares of N."""
_USUAL_EXPONENT, _EXPONENT_SPREAD = 0.6, 0.7
"""Median of the prior of b, and the standard deviation of its logarithm: 0.19 to 1.9 for nine of ten."""


@dataclass(frozen=True, eq=False)
class CurveSample:
    """Curves that are equally probable after what was measured.

    Attributes:
        num_images: N.
        errors: E of each curve, (S,).
        floors: s, (S,).
        exponents: b, (S,).
        shifts: d as a share of N, (S,).
        misfits: standard normal numbers, (S,).
    """

    num_images: int
    errors: Floats
    floors: Floats
    exponents: Floats
    shifts: Floats
    misfits: Floats

    def accuracies(self, number: float) -> Floats:
        """Return the accuracy of each curve on so many training images, (S,) in [0, 1]."""
        ratio = number / self.num_images
        shape = (
            self.floors + (1 - self.floors) * ((ratio + self.shifts) / (1 + self.shifts)) ** -self.exponents
        )
        doublings = max(0.0, math.log2(ratio))
        return np.clip(1 - self.errors * shape * np.exp(MISFIT * doublings * self.misfits), 0.0, 1.0)

    def limits(self) -> Floats:
        """Return the accuracy of each curve with any number of images, (S,)."""
        return np.clip(1 - self.errors * self.floors, 0.0, 1.0)


def fit_curves(curve: LearningCurve, seed: int) -> CurveSample:
    """Return curves drawn from the posterior distribution of power laws with a floor.

    Args:
        curve: the measured points.
        seed: of the draw.
    """
    grid = np.array([*product(_FLOORS, _EXPONENTS, _SHIFTS)])
    floors, exponents, shifts = grid.T
    ratios = curve.sizes / curve.num_images
    falls = ((ratios[None] + shifts[:, None]) / (1 + shifts[:, None])) ** -exponents[:, None]
    shapes = floors[:, None] + (1 - floors[:, None]) * falls
    weights, means, deviations = _fit_errors(shapes, 1 - curve.accuracies, SLACK * curve.covariance)
    weights += -0.5 * (np.log(exponents / _USUAL_EXPONENT) / _EXPONENT_SPREAD) ** 2
    probabilities = np.exp(weights - weights.max())
    rng = np.random.default_rng(seed)
    drawn = rng.choice(len(grid), NUM_CURVES, p=probabilities / probabilities.sum())
    errors = np.clip(rng.normal(means[drawn], deviations[drawn]), 1e-4, 1.0)
    misfits = rng.standard_normal(NUM_CURVES)
    return CurveSample(curve.num_images, errors, floors[drawn], exponents[drawn], shifts[drawn], misfits)


def _fit_errors(shapes: Floats, errors: Floats, covariance: Floats) -> tuple[Floats, Floats, Floats]:
    """Return the log evidence of each shape (G, P), and mean and deviation of the E it is multiplied by.

    With a flat prior of E and Gaussian noise this is generalised least squares, in closed form.
    """
    inverse = np.linalg.inv(covariance)
    turned = shapes @ inverse
    precisions = np.einsum("gp,gp->g", turned, shapes)
    means = turned @ errors / precisions
    evidence = 0.5 * (means**2 * precisions - np.log(precisions))
    return evidence, means, 1 / np.sqrt(precisions)


def find_interval(values: Floats) -> tuple[float, float, float]:
    """Return the median, and the ends of the interval of :data:`LEVEL`."""
    tail = (1 - LEVEL) / 2
    low, middle, high = np.quantile(values, (tail, 0.5, 1 - tail))
    return float(middle), float(low), float(high)
