"""The plan of a run: which stages of a network learn in which phase, and with which lr."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from torch import nn

from finetune.errors import UsageError
from finetune.recipe import StrategySettings
from finetune.strategies import Group, Phase, assign_groups, find_strategy, lay_phases
from pretrained.graph.stages import Stage

NormMode = Literal["train", "eval", "none"]
NORM_LAYERS = (nn.modules.batchnorm._NormBase,)
"""Layers with running statistics. LayerNorm and GroupNorm have none and behave alike in both modes."""


@dataclass(frozen=True)
class PlanRow:
    """How one stage is trained.

    Attributes:
        group: head, top or body.
        stage: the stage.
        num_parameters: number of its parameters.
        lr: learning rate before the schedule, 0 when frozen.
        norm: mode of its layers with running statistics; ``none`` if it has no such layers.
    """

    group: Group
    stage: Stage
    num_parameters: int
    lr: float
    norm: NormMode

    @property
    def trained(self) -> bool:
        """Whether the stage is trained."""
        return self.lr > 0

    def cells(self) -> tuple[str, str, int, bool, float, str]:
        """Return the values of a row of ``plan.csv``."""
        return (self.group, self.stage.name, self.num_parameters, self.trained, self.lr, self.norm)


PLAN_COLUMNS = ("group", "stage", "parameters", "trained", "rate", "norm")


@dataclass(frozen=True)
class Plan:
    """Which stages learn, and with which lr.

    Attributes:
        rows: one row per stage, from stem to head. Over several phases, a stage has its highest lr.
        phases: first epoch (from 0) and plan of each phase; empty if there is only one.
    """

    rows: tuple[PlanRow, ...]
    phases: tuple[tuple[int, Plan], ...] = ()

    @property
    def frozen(self) -> tuple[PlanRow, ...]:
        """Rows of stages that are frozen in the whole run."""
        return tuple(row for row in self.rows if not row.trained)

    @property
    def trained(self) -> tuple[PlanRow, ...]:
        """Rows of stages that learn."""
        return tuple(row for row in self.rows if row.trained)

    @property
    def num_trained(self) -> int:
        """Number of trained parameters."""
        return sum(row.num_parameters for row in self.trained)

    def at(self, epoch: int) -> Plan:
        """Return the plan of the phase of an epoch (from 0)."""
        begun = [plan for first, plan in self.phases if first <= epoch]
        return begun[-1] if begun else self

    def describe_phases(self) -> list[str]:
        """Return one line per phase; none if there is only one phase."""
        return [
            f"phase {number}, from epoch {first + 1}: {', '.join(row.stage.name for row in plan.trained)}"
            for number, (first, plan) in enumerate(self.phases, 1)
        ]


def build_plan(
    network: nn.Module, stages: Sequence[Stage], settings: StrategySettings, lr: float, epochs: int
) -> Plan:
    """Apply a strategy to a network's stages.

    Args:
        network: network that owns the stages' parameters; it is not changed.
        stages: stages from stem to head.
        settings: section ``strategy`` of the recipe.
        lr: base learning rate.
        epochs: epochs of the whole training.

    Raises:
        UsageError: there are more top stages than stages, more phases than epochs, or nothing to train.
    """
    plan = lay_plan(network, stages, settings, lr, epochs)
    for part in (plan, *(part for _, part in plan.phases)):
        if part.num_trained == 0:
            fix = "Take head=replace or another strategy."
            raise UsageError(f"--strategy {settings.name}", "the network has no classifier to train", fix)
    return plan


def lay_plan(
    network: nn.Module, stages: Sequence[Stage], settings: StrategySettings, lr: float, epochs: int
) -> Plan:
    """Return the plan of :func:`build_plan` for a network that may have no classifier yet."""
    phases = lay_phases(find_strategy(settings.name), stages, settings)
    firsts = find_first_epochs([phase.share for phase in phases], epochs, settings.name)
    groups = assign_groups(stages, settings.top_stages)
    plans = [_lay_phase(network, stages, groups, settings, lr, phase) for phase in phases]
    if len(plans) == 1:
        return plans[0]
    rows = tuple(max(rows, key=lambda row: row.lr) for rows in zip(*(p.rows for p in plans), strict=True))
    return Plan(rows, tuple(zip(firsts, plans, strict=True)))


def _lay_phase(
    network: nn.Module,
    stages: Sequence[Stage],
    groups: Sequence[Group],
    settings: StrategySettings,
    lr: float,
    phase: Phase,
) -> Plan:
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    rows = [
        PlanRow(
            group=group,
            stage=stage,
            num_parameters=sum(sizes[name] for name in stage.parameters),
            lr=lr * phase.factors[stage.name],
            norm=_norm_mode(network, stage, settings.norm_mode if phase.factors[stage.name] else "eval"),
        )
        for stage, group in zip(stages, groups, strict=True)
    ]
    return Plan(tuple(rows))


def find_first_epochs(shares: Sequence[float], epochs: int, name: str) -> list[int]:
    """Return the first epoch (from 0) of each phase; each phase has at least one epoch.

    Args:
        shares: relative length of each phase, above 0.
        epochs: epochs of the whole training.
        name: name of the strategy, for the error message.

    Raises:
        UsageError: there are fewer epochs than phases.
    """
    if epochs < len(shares):
        found = f"--strategy {name} trains in {len(shares)} phases of at least one epoch"
        raise UsageError(f"--epochs {epochs}", found, f"Take --epochs {len(shares)} or more.")
    firsts = [0]
    for number, before in enumerate(list(accumulate(shares))[:-1], 1):
        wanted = round(epochs * before / sum(shares))
        firsts.append(min(max(wanted, firsts[-1] + 1), epochs - (len(shares) - number)))
    return firsts


def _norm_mode(network: nn.Module, stage: Stage, mode: Literal["train", "eval"]) -> NormMode:
    modules = dict(network.named_modules())
    has_norm = any(isinstance(modules[name], NORM_LAYERS) for name in stage.modules)
    return mode if has_norm else "none"
