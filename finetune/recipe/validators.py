"""Checks of values that a type and bounds cannot express."""

from __future__ import annotations

import re
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


_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(s|m|h)")
_UNITS = {"s": 1, "m": 60, "h": 3600}


def parse_duration(text: str) -> float:
    """Return the seconds of a duration such as ``90s``, ``10m`` or ``1.5h``, at least one.

    Raises:
        ValueError: it is no duration, or shorter than a second.
    """
    match = _DURATION.fullmatch(text)
    seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if seconds < 1:
        raise ValueError(text)
    return seconds


def check_duration(text: str) -> str:
    """Return a duration as it is written.

    Raises:
        ValueError: see :func:`parse_duration`.
    """
    parse_duration(text)
    return text


def check_ascending(values: tuple[float, ...]) -> tuple[float, ...]:
    """Return the values if each is larger than the one before.

    Raises:
        ValueError: they are not ascending.
    """
    if any(later <= earlier for earlier, later in pairwise(values)):
        raise ValueError(values)
    return values
