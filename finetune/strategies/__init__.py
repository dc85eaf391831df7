"""Strategies: which stages learn, with which lr. This package is the only place that holds their names.

A strategy is one file here and one line below. The recipe's check, the errors, ``--help`` and
``docs/recipe.md`` read everything about a name from the registered object. Nothing here imports torch,
because recipes and the command line do not.
"""

from finetune.strategies.matrix import FREEZE, FULL, SCRATCH, TOP
from finetune.strategies.registry import (
    AUTO,
    STRATEGIES,
    find_strategy,
    join_names,
    register_strategy,
    starts_random,
)
from finetune.strategies.strategy import Group, Phase, Strategy, StrategyKeys, assign_groups, lay_phases

register_strategy(FREEZE)
register_strategy(TOP)
register_strategy(FULL)
register_strategy(SCRATCH)

__all__ = [
    "AUTO",
    "STRATEGIES",
    "Group",
    "Phase",
    "Strategy",
    "StrategyKeys",
    "assign_groups",
    "find_strategy",
    "join_names",
    "lay_phases",
    "register_strategy",
    "starts_random",
]
