"""What every registered strategy keeps to, on networks of three kinds; and what the registry refuses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import timm
import torch
from torch import nn

from finetune.errors import InternalError, UsageError
from finetune.recipe import Recipe, load_recipe
from finetune.recipe.page import build_page
from finetune.strategies import (
    AUTO,
    STRATEGIES,
    Phase,
    Strategy,
    StrategyKeys,
    find_strategy,
    lay_phases,
    register_strategy,
    starts_random,
)
from finetune.training.freeze import build_param_groups, freeze
from finetune.training.plan import build_plan, find_first_epochs
from pretrained.graph.classifier import head_parameters
from pretrained.graph.stages import Stage, find_stages
from tests.strategies.gradual import gradual_unfreezing
from tests.sweeps import slow_except

NAMES = (*STRATEGIES, "gradual")


@pytest.fixture(autouse=True)
def gradual() -> Iterator[None]:
    with gradual_unfreezing():
        yield


@pytest.fixture(scope="module", params=["resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_100"])
def network(request: pytest.FixtureRequest) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(request.param, num_classes=2)


def recipe_of(name: str, **keys: object) -> Recipe:
    return load_recipe(None, {"strategy.name": name} | {f"strategy.{k}": v for k, v in keys.items()})


@pytest.mark.sample(5)
@pytest.mark.parametrize("epochs", slow_except([10], [3, 10, 37]))
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_one_place_in_every_phase(network: nn.Module, name: str, epochs: int) -> None:
    """Each epoch has a phase, in order; what learns in it is in one group, and what does not in none."""
    stages = find_stages(network, (3, 224, 224), head=head_parameters(network))
    keys = recipe_of(name, top_stages=2).strategy
    phases = lay_phases(find_strategy(name), stages, keys)
    plan = build_plan(network, stages, keys, 0.01, epochs)
    plans = [plan.at(epoch) for epoch in range(epochs)]
    firsts = find_first_epochs([phase.share for phase in phases], epochs, name)
    assert firsts[0] == 0
    assert len({id(part) for part in plans}) == len(phases)
    ever: set[str] = set()
    for phase, first in zip(phases, firsts, strict=True):
        part = plans[first]
        assert [row.stage for row in part.rows] == list(stages)
        assert [row.lr for row in part.rows] == [0.01 * phase.factors[stage.name] for stage in stages]
        assert part.trained
        freeze(network, part)
        groups = build_param_groups(network, part, 0.1)
        placed = [id(parameter) for group in groups for parameter in group["params"]]
        learning = {n for stage in stages if phase.factors[stage.name] > 0 for n in stage.parameters}
        ever |= learning
        assert sorted(placed) == sorted(id(network.get_parameter(n)) for n in learning)
    assert {n for row in plan.trained for n in row.stage.parameters} == ever
    assert {n for stage in stages if stage.role == "head" for n in stage.parameters} <= ever


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_says_what_it_is(network: nn.Module, name: str) -> None:
    strategy = find_strategy(name)
    assert strategy.name == name == recipe_of(name).strategy.name
    assert strategy.description.strip() == strategy.description != ""
    assert not set(strategy.description) & set("\n|;.")  # a part of a sentence in a table
    assert strategy.views >= 1
    assert strategy.pretrained != starts_random(name)
    assert strategy.pretrained or not (strategy.fine_tunes or strategy.solvable)
    stages = find_stages(network, (3, 224, 224), head=head_parameters(network))
    plan = build_plan(network, stages, recipe_of(name).strategy, 0.01, epochs=10)
    below = [row for row in plan.trained if row.group != "head"]
    assert not (strategy.solvable and below)
    assert strategy.fine_tunes == bool(strategy.pretrained and below)


# --- the registry --------------------------------------------------------------------------------


def test_the_documentation_and_the_refusals_come_from_the_registry() -> None:
    page = build_page()
    for name in STRATEGIES.keys() - {"gradual"}:  # the page tells of what the package has
        assert f"{name}: {find_strategy(name).description};" in page
    with pytest.raises(UsageError, match="it must be freeze, top, full, scratch, gradual or auto") as refused:
        recipe_of("gradul")
    assert "did you mean 'gradual'?" in refused.value.found


def test_auto_is_no_strategy() -> None:
    assert recipe_of(AUTO).strategy.name == AUTO
    with pytest.raises(UsageError, match="no strategy has this name"):
        find_strategy(AUTO)
    assert not starts_random(AUTO)


class Given(Strategy):
    """Phases that a test gives."""

    given: Sequence[Phase] = ()

    def phases(self, stages: Sequence[Stage], keys: StrategyKeys) -> Sequence[Phase]:
        return self.given


@pytest.mark.parametrize("name", ["top", "auto", "Top", "two words", "", "a/b", "-a"])
def test_a_name_is_one_plain_word_of_its_own(name: str) -> None:
    before = dict(STRATEGIES)
    with pytest.raises(ValueError, match="strategy"):
        register_strategy(Given(name, "nothing"))
    assert before == STRATEGIES


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ([], "no phases"),
        ([Phase({"a": 1.0})], "every stage a factor: b"),
        ([Phase({"a": 1.0, "b": 1.0, "c": 1.0})], "every stage a factor: c"),
        ([Phase({"a": 1.0, "b": -0.1})], "out of range"),
        ([Phase({"a": 1.0, "b": 0.1}), Phase({"a": 1.0, "b": 0.1}, share=0.0)], "out of range"),
    ],
)
def test_phases_that_leave_something_open_are_refused(phases: list[Phase], said: str) -> None:
    stages = [Stage("a", "stem", (), ()), Stage("b", "head", (), ())]
    strategy = Given("given", "nothing")
    object.__setattr__(strategy, "given", phases)
    with pytest.raises(InternalError, match=said):
        lay_phases(strategy, stages, recipe_of("top").strategy)


# --- epochs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "epochs", "firsts"),
    [
        ([1.0], 1, [0]),
        ([1.0, 1.0], 10, [0, 5]),
        ([1.0, 3.0], 10, [0, 2]),
        ([1.0, 1.0, 1.0], 3, [0, 1, 2]),
        ([0.001, 1.0], 4, [0, 1]),
        ([1.0, 0.001, 0.001], 4, [0, 2, 3]),
    ],
)
def test_phases_share_the_epochs_and_each_has_one(
    shares: list[float], epochs: int, firsts: list[int]
) -> None:
    assert find_first_epochs(shares, epochs, "x") == firsts


def test_fewer_epochs_than_phases_are_refused() -> None:
    with pytest.raises(UsageError, match="3 phases") as refused:
        find_first_epochs([1.0, 1.0, 1.0], 2, "x")
    assert "--epochs 3" in refused.value.fix
