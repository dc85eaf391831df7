"""The general pattern: the layers that its numbers ask for, in order."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

from tests.zoo.certify import build, images, num_parameters
from tests.zoo.classics import outline


def layers(**arguments: object) -> str:
    """``C`` convolution, ``R`` ReLU, ``P`` pool, ``F`` fully connected, in the order of the data flow."""
    letters = {nn.Conv2d: "C", nn.ReLU: "R", nn.MaxPool2d: "P", nn.Linear: "F"}
    modules = outline("conv_pattern", **arguments).modules()
    return "".join(letters.get(type(module), "") for module in modules)


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
    assert num_parameters(outline("conv_pattern")) == 550_570
    wide = outline("conv_pattern", img_size=(64, 32))
    assert wide(torch.zeros(2, 3, 64, 32, device="meta")).shape == (2, 10)


def test_what_cannot_be_is_refused() -> None:
    for wrong in ({"num_blocks": 6}, {"num_convolutions": 0}, {"num_blocks": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            timm.create_model("conv_pattern", **wrong)


def test_first_loss_and_gradients() -> None:
    network = build("conv_pattern")
    loss = nn.functional.cross_entropy(network(images(8)), torch.arange(8))
    loss.backward()
    assert abs(loss.item() - math.log(10)) < 0.1 * math.log(10)
    assert all(parameter.grad is not None for parameter in network.parameters())
