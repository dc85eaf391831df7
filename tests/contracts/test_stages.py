"""Every family of timm and every classifier of torchvision divides into ordered stages (without weights).

The order is checked against a record of its own: hooks that note when each layer is first called. All
families of both libraries together take about a minute on one core.
"""

from collections.abc import Iterator

import pytest
import timm
import torch
import torchvision
from torch import nn

from pretrained.graph.stages import Stage, find_stages
from tests.contracts.families import DEFAULT_TIMM, DEFAULT_TORCHVISION, ENCODERS, SMALLEST, TORCHVISION
from tests.sweeps import slow_except

# LSTMs are slow to trace; this grid is as good.
SMALLER_INPUTS = {"sequencer": (3, 64, 64)}


def build_timm(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    with torch.device("meta"):
        network = timm.create_model(name)
    return network, network.pretrained_cfg["input_size"]


def build_torchvision(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    size = 299 if name == "inception_v3" else 224
    slow_start = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    device = "cpu" if name.startswith("regnet") else "meta"  # RegNet reads numbers while it is built
    with torch.device(device):
        network = torchvision.models.get_model(name, weights=None, **slow_start)
    return network, (3, size, size)


def first_calls(network: nn.Module, input_size: tuple[int, int, int]) -> dict[str, int]:
    """When each leaf module with parameters is first called, by name (tokens of containers have no call)."""
    calls: dict[str, int] = {}
    leaves = {name: module for name, module in network.named_modules() if not list(module.children())}
    names = {module: name for name, module in leaves.items() if list(module.parameters())}

    def note(module: nn.Module, _: object) -> None:
        calls.setdefault(names[module], len(calls))

    handles = [module.register_forward_pre_hook(note) for module in names]
    was_training = network.training
    device = next(network.parameters()).device
    with torch.no_grad():
        network.eval()(torch.zeros(1, *input_size, device=device))
    network.train(was_training)
    for handle in handles:
        handle.remove()
    return calls


def starts(stages: tuple[Stage, ...], calls: dict[str, int]) -> Iterator[int]:
    """The first call of a layer in each stage that has one called."""
    for stage in stages:
        owners = {name.rpartition(".")[0] for name in stage.parameters}
        called = [calls[owner] for owner in owners if owner in calls]
        if called:
            yield min(called)


def check_division(network: nn.Module, stages: tuple[Stage, ...], has_head: bool) -> None:
    parameters = [name for stage in stages for name in stage.parameters]
    assert sorted(parameters) == sorted(name for name, _ in network.named_parameters())
    modules = [name for stage in stages for name in stage.modules]
    assert len(modules) == len(set(modules))
    assert set(modules) < {name for name, _ in network.named_modules()}
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names)
    assert 3 <= len(stages) <= 11
    roles = [stage.role for stage in stages]
    body = ["body"] * roles.count("body")
    assert body
    assert roles == ["stem", *body, *["neck"] * ("neck" in roles), *["head"] * has_head]


def test_no_family_of_timm_is_missing() -> None:
    assert set(SMALLEST) == set(timm.list_modules()) - {"zoo"}  # pretrained.zoo: tests/zoo/test_contract.py


@pytest.mark.sample(1)
@pytest.mark.parametrize("family", slow_except(DEFAULT_TIMM, sorted(SMALLEST)))
def test_timm_family(family: str) -> None:
    network, input_size = build_timm(SMALLEST[family])
    input_size = SMALLER_INPUTS.get(family, input_size)
    calls = first_calls(network, input_size)
    stages = find_stages(network, input_size)
    check_division(network, stages, has_head=family not in ENCODERS)
    order = list(starts(stages, calls))
    assert order == sorted(order)


@pytest.mark.parametrize("name", slow_except(DEFAULT_TORCHVISION, TORCHVISION))
def test_torchvision_classifier(name: str) -> None:
    network, input_size = build_torchvision(name)
    stages = find_stages(network, input_size)
    check_division(network, stages, has_head=True)
    order = list(starts(stages, first_calls(network, input_size)))
    assert order == sorted(order)
