"""Backward rules of ReLU: against captum where it is right, and where a hook on modules sees nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from captum.attr import Deconvolution, GuidedBackprop
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.explain.relu_rules import ReluRule, Rule
from tests.explain.places import build, noise

CAPTUM = {"deconv": Deconvolution, "guided": GuidedBackprop}


def attribute(network: nn.Module, images: Tensor, label: int, rule: Rule) -> tuple[Tensor, ReluRule]:
    pixels = images.clone().requires_grad_()
    with ReluRule(rule) as mode:
        score = network(pixels)[:, label].sum()
    return torch.autograd.grad(score, pixels)[0], mode


@pytest.mark.parametrize("rule", ["deconv", "guided"])
@pytest.mark.parametrize("name", ["torchvision/squeezenet1_1", "torchvision/resnet18", "torchvision/alexnet"])
def test_it_is_captum_on_networks_of_relu_modules(name: str, rule: Rule) -> None:
    network, images = build(name), noise((3, 64, 64), 1)
    found, mode = attribute(network, images, 3, rule)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = CAPTUM[rule](network).attribute(images.clone().requires_grad_(), 3)
    assert mode.num_relus > 5 and not mode.others
    assert expected.any() and torch.equal(found, expected)


def ignore_result(x: Tensor) -> Tensor:
    torch.relu_(x)
    return x


SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "module": nn.ReLU(),
    "module in place": nn.ReLU(inplace=True),
    "function": F.relu,
    "function in place": lambda x: F.relu(x, inplace=True),
    "operation": torch.relu,
    "method": lambda x: x.relu(),
    "method in place": lambda x: x.relu_(),
    "in place, its result ignored": ignore_result,
    "clamp": lambda x: x.clamp(min=0),
    "clamp_min": lambda x: torch.clamp_min(x, 0),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("rule", ["deconv", "guided"])
def test_every_spelling_of_relu_is_seen(spelling: str, rule: Rule) -> None:
    x = torch.tensor([-2.0, -1.0, 1.0, 2.0])
    down = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    leaf = x.clone().requires_grad_()
    with ReluRule(rule) as mode:
        y = SPELLINGS[spelling](leaf * 1)
    [gradient] = torch.autograd.grad((y * down).sum(), leaf)
    assert y.tolist() == [0, 0, 1, 2] and mode.num_relus == 1
    assert gradient.tolist() == ([0, 1, 0, 1] if rule == "deconv" else [0, 0, 0, 1])


@pytest.mark.parametrize("relu6", [nn.ReLU6(), nn.ReLU6(inplace=True), F.relu6, nn.Hardtanh(0, 6)])
def test_a_bounded_relu_keeps_its_bound(relu6: Callable[[Tensor], Tensor]) -> None:
    leaf = torch.tensor([-1.0, 1.0, 7.0]).requires_grad_()
    for rule, expected in (("deconv", [1, 1, 1]), ("guided", [0, 1, 0])):
        with ReluRule(rule) as mode:  # type: ignore[arg-type]
            y = relu6(leaf * 1)
        assert y.tolist() == [0, 1, 6] and mode.num_relus == 1
        assert torch.autograd.grad(y.sum(), leaf)[0].tolist() == expected


def test_a_hook_on_modules_misses_functions_and_this_does_not() -> None:
    """All ReLUs of torchvision's GoogLeNet are functions: captum gives the plain gradient there."""
    network = build("torchvision/googlenet")
    network.transform_input = False
    images = noise((3, 64, 64), 1)
    found, mode = attribute(network, images, 3, "deconv")
    pixels = images.clone().requires_grad_()
    [plain] = torch.autograd.grad(network(pixels)[:, 3].sum(), pixels)
    assert mode.num_relus == 57
    assert (found - plain).norm() > 0.5 * plain.norm()


def test_other_activations_are_counted() -> None:
    def counts(name: str, size: int) -> dict[str, int]:
        _, mode = attribute(build(name), noise((3, size, size), 1), 0, "guided")
        return {"relu": mode.num_relus, **mode.others}

    assert counts("test_vit", 160) == {"relu": 0, "gelu": 6, "scaled_dot_product_attention": 6}
    assert counts("test_efficientnet", 64)["silu"] == 11
    mixed = counts("mobilenetv3_small_050", 64)
    assert mixed["relu"] and mixed["hardswish"] == 19
