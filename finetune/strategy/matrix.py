"""The strategies as the lectures give them, with the same meaning on every backbone.

============  ===============================  =========================================
strategy      trained                          rates, as factors of the base rate
============  ===============================  =========================================
``freeze``    the head                         head 1
``top``       the head and the top stages      head 1, top 1/10
``full``      everything                       head 1, top 1/10, everything below 1/100
``scratch``   everything, from random weights  one rate
============  ===============================  =========================================

The factors belong to *stages*, not to layers: a geometric decay by layer would freeze the lower half
of a DenseNet-121 in effect, and leave a ResNet-18 nearly untouched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from finetune.errors import UsageError
from finetune.recipe import StrategySettings
from pretrained.graph.stages import Stage

Group = Literal["head", "top", "body"]
NormMode = Literal["train", "eval", "none"]
NORM_LAYERS = (nn.modules.batchnorm._NormBase,)
"""Layers that keep running statistics. LayerNorm and GroupNorm keep none, and work alike in both modes."""


@dataclass(frozen=True)
class PlanRow:
    """What happens to one stage.

    Attributes:
        group: head, top or body.
        stage: the stage.
        num_parameters: numbers in it.
        rate: learning rate at full schedule, 0 when frozen.
        norm: mode of its layers with running statistics; ``none`` when it has none.
    """

    group: Group
    stage: Stage
    num_parameters: int
    rate: float
    norm: NormMode

    @property
    def trained(self) -> bool:
        """Whether anything in the stage changes."""
        return self.rate > 0

    def cells(self) -> tuple[str, str, int, bool, float, str]:
        """Return the row as ``plan.csv`` has it."""
        return (self.group, self.stage.name, self.num_parameters, self.trained, self.rate, self.norm)


PLAN_COLUMNS = ("group", "stage", "parameters", "trained", "rate", "norm")


@dataclass(frozen=True)
class Plan:
    """What learns, and how fast: one row a stage, from stem to head."""

    rows: tuple[PlanRow, ...]

    @property
    def frozen(self) -> tuple[PlanRow, ...]:
        """Rows of stages that must not change."""
        return tuple(row for row in self.rows if not row.trained)

    @property
    def trained(self) -> tuple[PlanRow, ...]:
        """Rows of stages that learn."""
        return tuple(row for row in self.rows if row.trained)

    @property
    def num_trained(self) -> int:
        """Numbers that learn."""
        return sum(row.num_parameters for row in self.trained)


def build_plan(network: nn.Module, stages: Sequence[Stage], settings: StrategySettings, rate: float) -> Plan:
    """Lay a strategy over a network's stages.

    Args:
        network: owner of the stages' parameters; not changed.
        stages: from stem to head.
        settings: the recipe's section.
        rate: base rate.

    Raises:
        UsageError: more top stages than there are, or nothing would learn.
    """
    return _check_plan(lay_plan(network, stages, settings, rate), settings)


def lay_plan(network: nn.Module, stages: Sequence[Stage], settings: StrategySettings, rate: float) -> Plan:
    """Return the plan of :func:`build_plan` for a network that may have no classifier yet."""
    groups = assign_groups(stages, settings.top_stages)
    factors = factors_of(settings)
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    rows = [
        PlanRow(
            group=group,
            stage=stage,
            num_parameters=sum(sizes[name] for name in stage.parameters),
            rate=rate * factors[group],
            norm=_norm_mode(network, stage, settings.norm if factors[group] else "eval"),
        )
        for stage, group in zip(stages, groups, strict=True)
    ]
    return Plan(tuple(rows))


def _check_plan(plan: Plan, settings: StrategySettings) -> Plan:
    if plan.num_trained == 0:
        fix = "Take head=replace or another strategy."
        raise UsageError(f"--strategy {settings.name}", "the network has no classifier to train", fix)
    return plan


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


def factors_of(settings: StrategySettings) -> dict[Group, float]:
    """Return the rate factor of each group; 0 freezes it."""
    head, top, body = settings.head_factor, settings.top_factor, settings.body_factor
    table: dict[str, dict[Group, float]] = {
        "freeze": {"head": head, "top": 0.0, "body": 0.0},
        "top": {"head": head, "top": top, "body": 0.0},
        "full": {"head": head, "top": top, "body": body},
        "scratch": {"head": 1.0, "top": 1.0, "body": 1.0},
    }
    return table[settings.name]


def _norm_mode(network: nn.Module, stage: Stage, mode: Literal["train", "eval"]) -> NormMode:
    modules = dict(network.named_modules())
    has_norm = any(isinstance(modules[name], NORM_LAYERS) for name in stage.modules)
    return mode if has_norm else "none"
