"""A strategy is a sequence of training phases; each gives every stage of a network a factor of the lr."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from finetune.errors import InternalError, UsageError

if TYPE_CHECKING:  # it needs torch, and a recipe does not
    from pretrained.graph.stages import Stage

Group = Literal["head", "top", "body"]


class StrategyKeys(Protocol):
    """The keys of the recipe's section ``strategy`` that a strategy reads (described in docs/recipe.md)."""

    @property
    def top_stages(self) -> int: ...  # noqa: D102
    @property
    def head_factor(self) -> float: ...  # noqa: D102
    @property
    def top_factor(self) -> float: ...  # noqa: D102
    @property
    def body_factor(self) -> float: ...  # noqa: D102


@dataclass(frozen=True)
class Phase:
    """A part of training in which the same stages learn.

    Attributes:
        factors: lr of each stage, by its name, as a multiple of ``training.lr``; 0 freezes it.
        share: share of the epochs, relative to those of the other phases.
    """

    factors: Mapping[str, float]
    share: float = 1.0


@dataclass(frozen=True)
class Strategy(ABC):
    """Which stages learn, and with which lr; :func:`finetune.strategies.register_strategy` registers it.

    The lr schedule and ``training.patience`` count over the whole run, whatever its phases. Each phase
    freezes the network again and starts its optimizer without momentum.

    Attributes:
        name: lower-case letters, digits and hyphens; the recipe's ``strategy.name``.
        description: what learns, in a few words for ``--help`` and docs/recipe.md, without a full stop.
        pretrained: whether it starts from pretrained weights.
        fine_tunes: whether it trains pretrained stages, so that ``probe_first`` and ``floor`` apply.
        solvable: whether only the head learns, so that ``features`` may solve it instead of training it.
        wider: name of the strategy that trains more stages, which the report suggests next; "" for none.
        views: default number of random views of a training image for the frozen trunk (docs/cache.md).
    """

    name: str
    description: str
    pretrained: bool = True
    fine_tunes: bool = False
    solvable: bool = False
    wider: str = ""
    views: int = 1

    @abstractmethod
    def phases(self, stages: Sequence[Stage], keys: StrategyKeys) -> Sequence[Phase]:
        """Return the phases of training, in order.

        Args:
            stages: stages of a network, from stem to head. A network without a classifier has no head.
            keys: section ``strategy`` of the recipe.

        Returns:
            At least one phase; its factors contain every stage.
        """


def lay_phases(strategy: Strategy, stages: Sequence[Stage], keys: StrategyKeys) -> tuple[Phase, ...]:
    """Return a strategy's phases for the stages of a network, after checking them.

    Raises:
        UsageError: the network has fewer stages than ``top_stages``.
        InternalError: the strategy leaves a stage out, names an unknown one, or gives a negative number.
    """
    phases = tuple(strategy.phases(stages, keys))
    names = {stage.name for stage in stages}
    unlike = sorted({name for phase in phases for name in phase.factors.keys() ^ names})
    numbers = [number for phase in phases for number in (phase.share, *phase.factors.values())]
    fault = ""
    if unlike:
        fault = f"a phase does not give every stage a factor: {', '.join(unlike[:3])}"
    elif not phases or min(numbers) < 0 or any(phase.share == 0 for phase in phases):
        fault = "it has no phases, or a share or factor is out of range"
    if fault:
        fix = "Correct its `phases`; CONTRIBUTING.md says what they return."
        raise InternalError(f"strategy {strategy.name}", fault, fix)
    return phases


def assign_groups(stages: Sequence[Stage], top_stages: int) -> list[Group]:
    """Return the group of each stage: the head, the ``top_stages`` under it, and the body below.

    Raises:
        UsageError: there are fewer stages than that.
    """
    below = [stage for stage in stages if stage.role != "head"]
    if top_stages > len(below):
        found = f"the network has {len(below)} stages under its head"
        fix = f"Take at most {len(below)}; `finetune backbones show NAME` lists them."
        raise UsageError(f"strategy.top_stages={top_stages}", found, fix)
    top = {stage.name for stage in below[len(below) - top_stages :]}
    return ["head" if stage.role == "head" else "top" if stage.name in top else "body" for stage in stages]
