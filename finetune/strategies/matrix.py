"""The four strategies of the lectures' matrix, with the same meaning on every backbone.

============  ===============================  ======================================
strategy      trained                          lr, as factors of the base lr
============  ===============================  ======================================
``freeze``    the head                         head 1
``top``       the head and the top stages      head 1, top 1/10
``full``      everything                       head 1, top 1/10, everything below 1/100
``scratch``   everything, from random weights  the same everywhere
============  ===============================  ======================================

The factors belong to *stages*, not to layers: a geometric decay by layer would in effect
freeze the lower half of a DenseNet-121, and hardly change a ResNet-18.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.strategies.strategy import Group, Phase, Strategy, StrategyKeys, assign_groups

if TYPE_CHECKING:
    from pretrained.graph.stages import Stage


@dataclass(frozen=True, kw_only=True)
class GroupStrategy(Strategy):
    """One phase, with one factor for each group of stages.

    Attributes:
        factors: function from the recipe's keys to the lr factors of head, top and body.
    """

    factors: Callable[[StrategyKeys], Mapping[Group, float]]

    def phases(self, stages: Sequence[Stage], keys: StrategyKeys) -> Sequence[Phase]:
        """Return the one phase."""
        factors, groups = self.factors(keys), assign_groups(stages, keys.top_stages)
        return [Phase({stage.name: factors[group] for stage, group in zip(stages, groups, strict=True)})]


FREEZE = GroupStrategy(
    "freeze",
    "the head",
    solvable=True,
    wider="top",
    views=2,
    factors=lambda keys: {"head": keys.head_factor, "top": 0.0, "body": 0.0},
)
TOP = GroupStrategy(
    "top",
    "the head and the last stages",
    fine_tunes=True,
    wider="full",
    views=4,
    factors=lambda keys: {"head": keys.head_factor, "top": keys.top_factor, "body": 0.0},
)
FULL = GroupStrategy(
    "full",
    "everything",
    fine_tunes=True,
    factors=lambda keys: {"head": keys.head_factor, "top": keys.top_factor, "body": keys.body_factor},
)
SCRATCH = GroupStrategy(
    "scratch",
    "everything, from random weights",
    pretrained=False,
    factors=lambda _: {"head": 1.0, "top": 1.0, "body": 1.0},
)
