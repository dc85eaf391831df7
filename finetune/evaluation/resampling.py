"""95 % intervals of any metric of predictions, by drawing the images again (percentile bootstrap).

Shape legend: N images, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Weights = npt.NDArray[np.float64]
"""How often each image was drawn, (R, N)."""
NUM_RESAMPLES = 1_000
_MOST_NUMBERS = 20_000_000
"""Resamples x images that are held at once."""
LEVEL = 0.95


def resample(
    num_images: int, metrics: Mapping[str, Callable[[Weights], Floats]], seed: int = 0
) -> dict[str, list[float]]:
    """Return the middle 95 % of each metric's values over images drawn with replacement.

    A metric that has the same value in every draw has no interval, since its spread is unknown.

    Args:
        num_images, metrics, seed: see :func:`draw_values`.
    """
    found = {name: find_middle(values) for name, values in draw_values(num_images, metrics, seed).items()}
    return {name: [*ends] for name, ends in found.items() if ends is not None}


def find_middle(values: Floats) -> tuple[float, float] | None:
    """Return the ends of the middle 95 % of values (R,); None if they are all the same, or none."""
    if not len(values):
        return None
    low, high = np.quantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return (float(low), float(high)) if low < high else None


def draw_values(
    num_images: int, metrics: Mapping[str, Callable[[Weights], Floats]], seed: int = 0
) -> dict[str, Floats]:
    """Return each metric's values over images drawn with replacement, (R,) or fewer, none of them NaN.

    Args:
        num_images: number of evaluated images (N), at least one.
        metrics: functions from weights (R, N) to values (R,), NaN where a draw has no value.
        seed: seed of the draws.
    """
    rng = np.random.default_rng(seed)
    even, rows = np.full(num_images, 1 / num_images), max(1, _MOST_NUMBERS // num_images)
    values: dict[str, list[Floats]] = {name: [] for name in metrics}
    for start in range(0, NUM_RESAMPLES, rows):
        number = min(rows, NUM_RESAMPLES - start)
        weights = rng.multinomial(num_images, even, size=number).astype(np.float64)
        for name, compute in metrics.items():
            values[name].append(compute(weights))
    every = {name: np.concatenate(parts) for name, parts in values.items()}
    return {name: drawn[~np.isnan(drawn)] for name, drawn in every.items()}
