"""Sweeps of many cases, of which a few run by default and all with ``-m "slow or not slow"``."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_except(default: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """Parameters for ``pytest.mark.parametrize``; those outside ``default`` are marked slow.

    Raises:
        AssertionError: when a default case is none of the values, since then it would run nowhere.
    """
    values = list(values)
    missing = [value for value in default if value not in values]
    assert not missing, f"not in the sweep: {missing}"
    return [value if value in default else pytest.param(value, marks=pytest.mark.slow) for value in values]
