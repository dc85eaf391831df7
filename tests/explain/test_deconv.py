"""Projections of single units: against a transposed network that is written by hand."""

from __future__ import annotations

import warnings

import pytest
import torch
from captum.attr import NeuronDeconvolution, NeuronGuidedBackprop
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.errors import UsageError
from finetune.explain.deconv import project_units
from finetune.explain.relu_rules import Rule
from finetune.explain.units import Unit
from tests.explain.places import build, noise, place, plain


def transposed(features: nn.Sequential, image: Tensor, last: int, unit: Unit) -> Tensor:
    """Zeiler and Fergus' network, layer by layer, down from one unit of ``features[last]``."""
    values, switches = [image], {}
    for number, layer in enumerate(features[: last + 1]):
        if isinstance(layer, nn.MaxPool2d):
            value, switches[number] = F.max_pool2d(values[-1], 3, 2, return_indices=True)
        else:
            value = F.relu(values[-1]) if isinstance(layer, nn.ReLU) else layer(values[-1])
        values.append(value)
    signal = torch.zeros_like(values[-1])
    signal[0, unit.channel, unit.row, unit.column] = 1
    for number in range(last, -1, -1):
        layer, below = features[number], values[number]
        if isinstance(layer, nn.ReLU):
            signal = signal.clamp(min=0)
        elif isinstance(layer, nn.MaxPool2d):
            places = switches[number].flatten(2)
            signal = torch.zeros_like(below).flatten(2).scatter_add(2, places, signal.flatten(2))
            signal = signal.reshape(below.shape)
        else:
            stride, padding, kernel = layer.stride[0], layer.padding[0], layer.kernel_size[0]
            reached = (signal.shape[2] - 1) * stride - 2 * padding + kernel
            signal = F.conv_transpose2d(signal, layer.weight, None, stride, padding, below.shape[2] - reached)
    return signal


@pytest.mark.parametrize(("last", "unit"), [(12, Unit(7, 0, 0)), (10, Unit(100, 2, 1)), (3, Unit(5, 3, 4))])
def test_it_is_the_transposed_network_on_alexnet(last: int, unit: Unit) -> None:
    network, images = build("torchvision/alexnet"), noise((3, 95, 95), 1)
    found = project_units(network, plain(f"features.{last}"), images, [unit])
    with torch.no_grad():
        expected = transposed(network.features, images, last, unit)
    assert expected.any()
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("rule", ["deconv", "guided"])
def test_each_image_gets_its_own_unit(rule: Rule) -> None:
    network, images = build("torchvision/squeezenet1_1"), noise((3, 64, 64), 3)
    units = [Unit(1, 0, 0), Unit(2, 1, 2), Unit(1, 2, 1)]
    found = project_units(network, place(network, "features.7", (3, 64, 64)), images, units, rule)
    captum = {"deconv": NeuronDeconvolution, "guided": NeuronGuidedBackprop}[rule]
    for image, unit, projection in zip(images, units, found, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = captum(network, network.features[7]).attribute(
                image[None].requires_grad_(), tuple(unit)
            )
        assert torch.allclose(projection, expected[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "layer", "size", "words"),
    [
        ("test_vit", "blocks.1", 160, ("gelu (2)",)),
        ("test_efficientnet", "blocks.2", 64, ("silu",)),
        ("mobilenetv3_small_050", "blocks.3", 64, ("hardswish", "beside ReLU")),
    ],
)
def test_a_network_without_relu_is_refused(name: str, layer: str, size: int, words: tuple[str, ...]) -> None:
    network = build(name)
    position = place(network, layer, (3, size, size))
    with pytest.raises(UsageError, match="ReLU only") as caught:
        project_units(network, position, noise((3, size, size), 1), [Unit(0, 0, 0)])
    assert all(word in caught.value.found for word in words)
    assert "SqueezeNet" in caught.value.fix


def test_before_any_activation_a_projection_is_the_kernel() -> None:
    """Nothing between the image and the first convolution needs a rule, also in a network without ReLU."""
    network = build("test_efficientnet")
    images = noise((3, 64, 64), 1)
    found = project_units(network, place(network, "conv_stem", (3, 64, 64)), images, [Unit(3, 10, 10)])
    kernel = network.conv_stem.weight[3]
    [rows, columns] = [x.unique() for x in found[0].any(dim=0).nonzero().T]
    assert torch.allclose(found[0][:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], kernel)
