"""The registry: strategies by the names that recipes give them."""

from __future__ import annotations

import re
from collections.abc import Callable

from finetune.errors import UsageError
from finetune.strategies.strategy import Strategy

AUTO = "auto"
"""Value of ``strategy.name`` that lets ``finetune advise`` choose a strategy."""

STRATEGIES: dict[str, Strategy] = {}
"""Strategies by name, in the order of registration and of the documentation."""

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def register_strategy(strategy: Strategy) -> Strategy:
    """Register a strategy under its name, and return it.

    Raises:
        ValueError: the name is taken, or is not lower-case words joined by hyphens.
    """
    if not _NAME.fullmatch(strategy.name) or strategy.name == AUTO:
        raise ValueError(f"{strategy.name!r} is not a valid strategy name")
    if strategy.name in STRATEGIES:
        raise ValueError(f"a strategy named {strategy.name!r} is registered already")
    STRATEGIES[strategy.name] = strategy
    return strategy


def find_strategy(name: str) -> Strategy:
    """Return the strategy with a name.

    Raises:
        UsageError: no strategy has this name; :data:`AUTO` is not one either.
    """
    if name not in STRATEGIES:
        raise UsageError(f"--strategy {name}", "no strategy has this name", f"Take {join_names()}.")
    return STRATEGIES[name]


def join_names(*more: str, accept: Callable[[Strategy], bool] = lambda _: True) -> str:
    """Return the names of the strategies that ``accept`` selects, and ``more`` names, as ``a, b or c``."""
    *most, last = (*(name for name, strategy in STRATEGIES.items() if accept(strategy)), *more)
    return f"{', '.join(most)} or {last}" if most else last


def starts_random(name: str) -> bool:
    """Return whether a strategy starts from random weights; False for AUTO and unknown names."""
    return name in STRATEGIES and not STRATEGIES[name].pretrained
