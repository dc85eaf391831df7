"""The registry: strategies by the names that recipes give them."""

from __future__ import annotations

import re
from collections.abc import Callable

from finetune.errors import UsageError
from finetune.strategies.strategy import Strategy

AUTO = "auto"
"""Not a strategy, but the choice of one from evidence (``finetune advise``)."""

STRATEGIES: dict[str, Strategy] = {}
"""By name, in the order of registration, which is that of the documentation."""

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def register_strategy(strategy: Strategy) -> Strategy:
    """Make a strategy known by its name, everywhere; return it.

    Raises:
        ValueError: the name is taken, or not made of lower-case words with hyphens.
    """
    if not _NAME.fullmatch(strategy.name) or strategy.name == AUTO:
        raise ValueError(f"{strategy.name!r} is not a valid strategy name")
    if strategy.name in STRATEGIES:
        raise ValueError(f"a strategy named {strategy.name!r} is registered already")
    STRATEGIES[strategy.name] = strategy
    return strategy


def find_strategy(name: str) -> Strategy:
    """Return the strategy of a name.

    Raises:
        UsageError: there is none, as of :data:`AUTO`.
    """
    if name not in STRATEGIES:
        raise UsageError(f"--strategy {name}", "no strategy has this name", f"Take {join_names()}.")
    return STRATEGIES[name]


def join_names(*more: str, accept: Callable[[Strategy], bool] = lambda _: True) -> str:
    """Return the names of the strategies that ``accept`` takes, and more words, as ``a, b or c``."""
    *most, last = (*(name for name, strategy in STRATEGIES.items() if accept(strategy)), *more)
    return f"{', '.join(most)} or {last}" if most else last


def starts_random(name: str) -> bool:
    """Return whether a strategy starts from random weights; one that is not known, or AUTO, does not."""
    return name in STRATEGIES and not STRATEGIES[name].pretrained
