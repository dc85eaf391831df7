"""The rank correlation of two arrays. ``scipy.stats`` has it too, and takes over a second to import."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def correlate_ranks(first: NDArray[np.generic], second: NDArray[np.generic]) -> float:
    """Return Spearman's rank correlation of two arrays of one shape, from -1 to 1; NaN if one is constant.

    Equal values have the mean of their ranks.
    """
    with np.errstate(invalid="ignore"):  # of a constant array
        return float(np.corrcoef(_rank(first), _rank(second))[0, 1])


def _rank(values: NDArray[np.generic]) -> NDArray[np.float64]:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    means = np.cumsum(counts) - (counts - 1) / 2
    return np.asarray(means[places.ravel()])
