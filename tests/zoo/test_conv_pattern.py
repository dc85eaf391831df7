"""The general pattern: the layers that its numbers ask for, in order."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.certify import (
    assert_deviation,
    assert_gradient_everywhere,
    build,
    images,
    num_parameters,
    on_meta,
)
from tests.zoo.classics import close


def layers(**arguments: object) -> str:
    """``C`` convolution, ``R`` ReLU, ``P`` pool, ``F`` fully connected, in the order in which they run."""
    letters = {nn.Conv2d: "C", nn.ReLU: "R", nn.MaxPool2d: "P", nn.Linear: "F"}
    network, found = on_meta("conv_pattern", **arguments), []
    for module in network.modules():
        if type(module) in letters:
            module.register_forward_hook(lambda module, *_: found.append(letters[type(module)]))
    network(torch.zeros(1, 3, 32, 32, device="meta"))
    return "".join(found)


@pytest.mark.parametrize("convolutions", [1, 2, 3])
@pytest.mark.parametrize("with_pool", [True, False])
@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("hidden", [0, 1, 2])
def test_layers_are_those_of_the_pattern(
    convolutions: int, with_pool: bool, blocks: int, hidden: int
) -> None:
    found = layers(
        num_convolutions=convolutions, with_pool=with_pool, num_blocks=blocks, num_hidden=hidden, width=4
    )
    assert found == ("CR" * convolutions + "P" * with_pool) * blocks + "FR" * hidden + "F"


def test_count_and_sizes() -> None:
    """Computed: six convolutions, 2,048 x 128 and 128 x 10, with biases."""
    assert num_parameters(on_meta("conv_pattern")) == 550_570
    wide = on_meta("conv_pattern", img_size=(64, 32))
    assert wide(torch.zeros(2, 3, 64, 32, device="meta")).shape == (2, 10)


def test_what_cannot_be_is_refused() -> None:
    for wrong in ({"num_blocks": 6}, {"num_convolutions": 0}, {"num_blocks": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            timm.create_model("conv_pattern", **wrong)


@pytest.mark.parametrize("hidden", [0, 1, 2])
def test_numbers_agree_with_the_pattern(hidden: int) -> None:
    network = build("conv_pattern", num_blocks=2, num_hidden=hidden, width=4, hidden_width=8).eval()
    own = iter(network.parameters())
    x = y = images()
    with torch.no_grad():
        for _ in range(2):
            for _ in range(2):
                y = F.conv2d(y, next(own), next(own), padding=1).clamp(min=0)
            y = torch.stack([y[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]).amax(0)
        y = y.reshape(len(y), -1)
        for _ in range(hidden):
            y = (y @ next(own).T + next(own)).clamp(min=0)
        assert close(network(x), y @ next(own).T + next(own))


def test_gradient_reaches_every_parameter() -> None:
    assert_gradient_everywhere(build("conv_pattern"), images(8))


def test_weights_begin_by_the_rule_of_he() -> None:
    network = build("conv_pattern")
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            assert_deviation(module.weight, 0.01 if module is network.classifier else (2 / fan_in) ** 0.5)
            assert not module.bias.any()
