"""Spearman's rank correlation, beside that of scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from finetune.explain.rank_correlation import correlate_ranks


@pytest.mark.parametrize("ties", [2, 5, 1000])
def test_it_is_that_of_scipy(ties: int) -> None:
    rng = np.random.default_rng(ties)
    for _ in range(50):
        first, second = rng.integers(0, ties, (2, 30)).astype(np.float32)
        expected = spearmanr(first, second).statistic if np.ptp(first) and np.ptp(second) else np.nan
        found = correlate_ranks(first.reshape(5, 6), second.reshape(5, 6))
        assert found == pytest.approx(expected, nan_ok=True)


def test_a_constant_array_has_no_order() -> None:
    assert np.isnan(correlate_ranks(np.zeros(4), np.arange(4)))
