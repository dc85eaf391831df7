"""Every family is cut in two, and the parts do what the whole does: logits bit for bit, gradients equal.

Real networks with random weights, on the CPU: twelve by default, all families with ``-m slow`` (minutes).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from finetune.recipe import StrategySettings
from finetune.training.freeze import freeze, set_train_mode
from finetune.training.plan import Plan, build_plan
from pretrained.catalog import Card, find_card
from pretrained.graph.cut_network import CutNetwork, cut_at
from pretrained.graph.cuts import Cut, Trace, find_cuts, trace_calls
from pretrained.graph.stages import find_stages
from pretrained.heads import change_head
from pretrained.network import build_network
from tests.contracts.families import DEFAULT, ENCODERS, SMALLEST, TORCHVISION, ZOO, ZOO_DEFAULT
from tests.sweeps import slow_except

TOO_LARGE = ("mobilenetv5", "nasnet", "pnasnet", "beit", "naflexvit", "sequencer")
"""Families whose smallest model takes a minute each here; they are tried at no other place."""
FIRST = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet"),
    *("inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf"),
    *("regnet_y_400mf", "resnet18", "resnet50", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_0"),
    *("squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vgg11_bn", "vit_b_32", "wide_resnet50_2"),
)
"""The smallest of each family of torchvision."""
NAMES = [
    *(f"timm/{name}" for family, name in SMALLEST.items() if family not in {*ENCODERS, *TOO_LARGE}),
    *(f"torchvision/{name}" for name in TORCHVISION if name in FIRST),
    *ZOO,
]


def build(card: Card, strategy: str) -> tuple[nn.Module, Plan]:
    torch.manual_seed(0)
    network = build_network(replace(card, num_classes=card.num_classes or 10), 0.2)
    change_head(network, 5, "replace", 0.2)
    stages = find_stages(network, card.preprocessing.input_size)
    plan = build_plan(network, stages, StrategySettings(name=strategy), 0.01, epochs=10)
    freeze(network, plan)
    return network, plan


def cut(network: nn.Module, plan: Plan, images: Tensor) -> tuple[list[Cut], Trace, CutNetwork | None]:
    trace = trace_calls(network, tuple(images.shape[1:]))  # type: ignore[arg-type]
    cuts = find_cuts(trace, {name for row in plan.trained for name in row.stage.parameters})
    for place in cuts:
        cut_network = cut_at(network, trace, place, images, lambda: set_train_mode(network, plan))
        if cut_network is not None:
            return cuts, trace, cut_network
    return cuts, trace, None


def gradients(network: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    for parameter in network.parameters():
        parameter.grad = None
    logits.float().logsumexp(1).sum().backward()  # type: ignore[no-untyped-call]
    named = network.named_parameters()
    return {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


def check(name: str, strategy: str) -> CutNetwork:
    card = find_card(name)
    network, plan = build(card, strategy)
    images = torch.randn(3, *card.preprocessing.input_size, generator=torch.Generator().manual_seed(1))
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    _, _, cut_network = cut(network, plan, images[:2])
    assert cut_network is not None
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    network.eval()
    rest = cut_network.rest(network)
    with torch.no_grad():
        rows = cut_network.trunk(images)  # another number of images than the one it was tried on
        assert torch.equal(rest(rows), network(images))
    set_train_mode(network, plan)
    torch.manual_seed(2)
    whole = gradients(network, network(images))
    restore(network, before)
    torch.manual_seed(2)
    parts = gradients(network, rest(cut_network.trunk(images)))
    assert whole.keys() == parts.keys()
    assert whole and set(whole) <= {parameter for row in plan.trained for parameter in row.stage.parameters}
    for key, gradient in whole.items():
        torch.testing.assert_close(parts[key], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
    return cut_network


def restore(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Not by ``load_state_dict``, which asks for versions that a plain dict does not have."""
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            tensor.copy_(state[name])


@pytest.mark.sample(1)
@pytest.mark.parametrize("strategy", slow_except(["top"], ["freeze", "top"]))
@pytest.mark.parametrize("name", slow_except([*DEFAULT, *ZOO_DEFAULT], NAMES))
def test_the_parts_do_what_the_whole_does(name: str, strategy: str) -> None:
    check(name, strategy)
