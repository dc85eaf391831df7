"""Checks of values that a type and bounds cannot express."""

from __future__ import annotations

from itertools import pairwise

from finetune.strategies import AUTO, STRATEGIES


def check_strategy_name(name: str) -> str:
    """Return the name of a registered strategy, or ``auto``.

    Raises:
        ValueError: there is no strategy of that name.
    """
    if name not in list_strategy_names():
        raise ValueError(name)
    return name


def list_strategy_names() -> list[str]:
    """Return the values that ``strategy.name`` accepts."""
    return [*STRATEGIES, AUTO]


def check_ascending(values: tuple[float, ...]) -> tuple[float, ...]:
    """Return the values if each is larger than the one before.

    Raises:
        ValueError: they are not ascending.
    """
    if any(later <= earlier for earlier, later in pairwise(values)):
        raise ValueError(values)
    return values
