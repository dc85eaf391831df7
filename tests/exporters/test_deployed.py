"""The exported graph with every input and output, compared with timm and torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn

from finetune.data.transforms import build_eval_transform
from finetune.errors import UsageError
from finetune.exporters.deployed import LAYOUTS, Interface, Layout, build_program
from pretrained.catalog import Card, find_card
from pretrained.graph.classifier import head_parameters
from pretrained.graph.layers import Layers
from pretrained.network import build_network
from pretrained.stage_classifier import build_stage_classifier
from tests.sweeps import slow_except


@pytest.fixture(scope="module")
def card() -> Card:
    card = find_card("timm/test_resnet")
    view = replace(card.preprocessing, img_size=64, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    return replace(card, preprocessing=view, num_classes=3, temperature=2.5)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3).eval()


@pytest.mark.sample(1)
@pytest.mark.parametrize("layout", [None, *LAYOUTS])
@pytest.mark.parametrize("is_calibrated", [False, True])
def test_each_interface_gives_the_networks_outputs(
    card: Card, network: nn.Module, layout: Layout | None, is_calibrated: bool
) -> None:
    """The reference is timm's transform of the image, and softmax(logits / T) written out."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 90, 70, 3), dtype=np.uint8)
    images = [Image.fromarray(one) for one in pixels]
    transform = create_transform(**card.preprocessing.to_timm(), is_training=False)
    normalised: Tensor = torch.stack([transform(image) for image in images])
    views = torch.stack([build_eval_transform(card.preprocessing)(image) for image in images])
    interface = Interface(layout, is_calibrated)
    given = interface.arrange(views, card.preprocessing)
    assert given.shape[1:] == interface.input_shape(card.preprocessing)
    assert str(given.dtype) == f"torch.{interface.input_dtype}"
    program = build_program(network, card, interface).module()
    with torch.no_grad():
        logits = network(normalised)
        found = program(given)
        alone = program(given[:1])
    expected = (logits / 2.5).exp() / (logits / 2.5).exp().sum(1, keepdim=True) if is_calibrated else logits
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(alone, expected[:1], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    slow_except(["timm/test_vit"], ["timm/test_resnet", "timm/test_vit", "torchvision/squeezenet1_1"]),
)
def test_a_classifier_on_stages_is_traced(name: str) -> None:
    """Its own forward ends by an exception, which cannot be traced."""
    torch.manual_seed(0)
    card = find_card(name)
    size = card.preprocessing.input_size
    below = build_network(replace(card, num_classes=1))
    layers = list(Layers(below, (), size).modules().values())
    points = [layers[len(layers) // 3].point, layers[len(layers) // 2].point]
    staged = build_stage_classifier(below, points, "auto", 4, size).eval()
    program = build_program(staged, replace(card, num_classes=4), Interface())
    images = torch.randn(3, *size)
    with torch.no_grad():
        assert torch.allclose(program.module()(images), staged(images), atol=1e-6)
        assert torch.allclose(program.module()(images[:1]), staged(images[:1]), atol=1e-6)
    read = {node.target for node in program.graph.nodes if node.op == "placeholder" and node.users}
    own_classifier = {f"p_network_network_{key.replace('.', '_')}" for key in head_parameters(below)}
    assert own_classifier
    assert not own_classifier & read  # operations after the last feature are not computed


class OneSize(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)).repeat(1, 1) * len(images)


class ByValue(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


@pytest.mark.parametrize("network", [OneSize(), ByValue()])
def test_a_network_that_cannot_be_traced_is_refused(card: Card, network: nn.Module) -> None:
    with pytest.raises(UsageError, match=r"cannot trace it for any number of images \(\w+: .+\)") as caught:
        build_program(network, card, Interface())
    assert "--format timm" in caught.value.fix
