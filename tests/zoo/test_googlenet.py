"""GoogLeNet as published: Table 1, auxiliary classifiers in training only, and a second forward pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrained.zoo.base import collect_auxiliary_logits
from pretrained.zoo.googlenet import (
    AUXILIARY_WEIGHT,
    MODULES,
    FilterCounts,
    GoogLeNet,
    Inception,
    NaiveInception,
)
from tests.zoo.certify import assert_deviation, build, images, num_parameters, on_meta
from tests.zoo.classics import close, fill, normalise, shapes

SIZE = (3, 224, 224)
TABLE_1 = {
    "3a": (159, 128),
    "3b": (380, 304),
    "4a": (364, 73),
    "4b": (437, 88),
    "4c": (463, 100),
    "4d": (580, 119),
    "4e": (840, 170),
    "5a": (1072, 54),
    "5b": (1388, 71),
}
"""Published: parameters in units of 1,024, multiply-adds in millions."""


def test_counts() -> None:
    """Computed; Table 1 adds up to 6.8M without auxiliary classifiers and with another first layer."""
    assert num_parameters(on_meta("googlenet_2014")) == 13_378_280
    assert num_parameters(on_meta("googlenet_2014", auxiliary=False)) == 6_998_552


def test_the_maps_have_the_sizes_of_table_1() -> None:
    found = shapes(on_meta("googlenet_2014"), SIZE)
    names = ("conv1", "conv2", *(f"inception{name}" for name in MODULES))
    assert [found[name] for name in names] == [
        *((64, 112, 112), (192, 56, 56), (256, 28, 28), (480, 28, 28), (512, 14, 14), (512, 14, 14)),
        *((512, 14, 14), (528, 14, 14), (832, 14, 14), (832, 7, 7), (1024, 7, 7)),
    ]


@pytest.mark.parametrize("name", MODULES)
def test_modules_have_the_parameters_and_operations_of_table_1(name: str) -> None:
    """But for misprints: the filters of 4c give 497K, which its 100M need, and those of 5a 1018K and 51M."""
    module = on_meta("googlenet_2014").get_submodule(f"inception{name}")
    weights = sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Conv2d))
    size = {"3": 28, "4": 14, "5": 7}[name[0]]
    parameters, millions = TABLE_1[name]
    if name not in ("4c", "5a"):
        assert weights / 1024 == pytest.approx(parameters, rel=0.02)
    if name != "5a":
        assert weights * size**2 / 1e6 == pytest.approx(millions, abs=1)
    assert {"4c": 509_440, "5a": 1_042_432}.get(name, weights) == weights


def small(**arguments: object) -> GoogLeNet:
    network = on_meta("googlenet_2014", num_classes=7, **arguments)
    fill(network.children())
    return network


def convolve(module: nn.Module, x: Tensor, stride: int = 1) -> Tensor:
    weight, bias = module[0].weight, module[0].bias
    return F.conv2d(x, weight, bias, stride, padding=weight.shape[-1] // 2).relu()


def test_numbers_agree_with_the_figure() -> None:
    network, x = small(auxiliary=False).eval(), images(1, (3, 64, 64))

    def pool(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 2, ceil_mode=True)

    with torch.no_grad():
        logits = network(x)
        x = normalise(pool(convolve(network.conv1, x, 2)), k=1.0, alpha=1e-4 / 5)
        x = pool(normalise(convolve(network.conv2, convolve(network.conv2_reduce, x)), k=1.0, alpha=1e-4 / 5))
        for name in MODULES:
            own = network.get_submodule(f"inception{name}")
            branches = [
                convolve(own.one, x),
                convolve(own.three, convolve(own.reduce3, x)),
                convolve(own.five, convolve(own.reduce5, x)),
                convolve(own.project, F.max_pool2d(x, 3, 1, padding=1)),
            ]
            x = torch.cat(branches, dim=1)
            x = pool(x) if name in ("3b", "4e") else x
        assert close(logits, F.linear(x.mean((2, 3)), network.head.fc.weight, network.head.fc.bias))


def test_weights_begin_by_the_rule_of_glorot_and_biases_at_a_fifth_but_for_the_logits() -> None:
    for name, module in build("googlenet_2014").named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            positions = module.weight[0, 0].numel()
            fans = positions * (module.weight.shape[0] + module.weight.shape[1])
            assert_deviation(module.weight, (2 / fans) ** 0.5)
            assert module.bias.eq(0.0 if name.endswith((".fc2", "head.fc")) else 0.2).all()


def test_auxiliary_classifiers_run_in_training_only_and_for_who_collects() -> None:
    network, x = small(), images(2, (3, 64, 64))
    calls = []
    network.auxiliary4a.register_forward_hook(lambda *_: calls.append("4a"))
    with collect_auxiliary_logits(network) as collected:
        logits = network.train()(x)
    assert logits.shape == (2, 7)
    assert [(one.logits.shape, one.weight) for one in collected] == [((2, 7), AUXILIARY_WEIGHT)] * 2
    with collect_auxiliary_logits(network) as collected:
        network.eval()(x)
    network.train()(x)
    assert collected == [] and calls == ["4a"]
    with collect_auxiliary_logits(nn.Linear(2, 2)) as collected:
        pass
    assert collected == []


def test_the_gradient_of_all_losses_reaches_every_parameter() -> None:
    network = on_meta("googlenet_2014").train()
    with collect_auxiliary_logits(network) as auxiliary:
        loss = network(torch.zeros(2, *SIZE, device="meta")).sum()
    for logits, weight in auxiliary:
        loss = loss + weight * logits.sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_an_auxiliary_classifier_is_that_of_section_5() -> None:
    """Quoted: "5 x 5 filter size and stride 3, resulting in a 4 x 4 x 512 output"."""
    own = on_meta("googlenet_2014").auxiliary4a
    assert own.conv[0].weight.shape == (128, 512, 1, 1)
    assert own.fc1.weight.shape == (1024, 2048) and own.fc2.weight.shape == (1000, 1024)
    assert own.drop.p == 0.7
    fill([own])
    x = images(1, (512, 14, 14))
    with torch.no_grad():
        hidden = own.conv(F.avg_pool2d(x, 5, 3)).flatten(1)
        assert close(own.eval()(x), own.fc2(own.fc1(hidden).relu()))


def test_new_classes_reach_all_three_classifiers() -> None:
    network = on_meta("googlenet_2014")
    network.reset_classifier(3)
    outputs = [network.head.fc, network.auxiliary4a.fc2, network.auxiliary4d.fc2]
    assert [layer.out_features for layer in outputs] == [3, 3, 3]


# --- the naive module ------------------------------------------------------------------------------


def operations(module: nn.Module, positions: int) -> int:
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    return positions * sum(layer.weight.numel() for layer in layers)


def test_the_naive_module_costs_854_million_operations_and_the_reduced_one_271() -> None:
    """The example of the lectures: 28 x 28 x 256 in, 128, 192 and 96 filters, reductions to 64.

    They say 358 million for the reduced one, which is the sum of their own rows with the 3 x 3 counted twice.
    """
    with torch.device("meta"):
        naive = NaiveInception(256, FilterCounts(128, 0, 192, 0, 96, 0))
        reduced = Inception(256, FilterCounts(128, 64, 192, 64, 96, 64))
    assert round(operations(naive, 28**2) / 1e6) == 854
    assert round(operations(reduced, 28**2) / 1e6) == 271
    twice = operations(reduced, 28**2) + operations(reduced.three, 28**2)
    assert round(twice / 1e6) == 358
    x = torch.zeros(1, 256, 28, 28, device="meta")
    assert naive(x).shape == (1, 672, 28, 28) and reduced(x).shape == (1, 480, 28, 28)


def test_numbers_of_the_naive_module_agree_with_figure_2a() -> None:
    torch.manual_seed(0)
    module, x = NaiveInception(5, FilterCounts(2, 0, 3, 0, 4, 0)), images(2, (5, 6, 7))
    pooled = F.pad(x, (1, 1, 1, 1), value=-float("inf")).unfold(2, 3, 1).unfold(3, 3, 1).amax((4, 5))
    with torch.no_grad():
        branches = [convolve(module.one, x), convolve(module.three, x), convolve(module.five, x), pooled]
        assert close(module(x), torch.cat(branches, dim=1))


def test_the_naive_network_grows() -> None:
    """Computed; nobody published it."""
    network = on_meta("googlenet_2014_naive")
    assert num_parameters(network) == 104_274_376
    assert network.num_features > 3 * 1024
