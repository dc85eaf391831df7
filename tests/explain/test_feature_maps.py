"""Feature maps by strength and contribution, and the kernels of convolutions."""

from __future__ import annotations

import pytest
import torch
from captum.attr import LayerActivation, LayerGradientXActivation
from torch import nn

from finetune.errors import UsageError
from finetune.explain.feature_maps import compute_feature_maps
from finetune.explain.filters import find_convolution, read_filters
from tests.explain.places import build, noise, place

SIZE = (3, 64, 64)


def test_with_pooling_and_a_linear_head_contributions_add_up_to_the_logit() -> None:
    network, images = build("test_resnet"), noise(SIZE)
    found = compute_feature_maps(network, place(network, "layer4", SIZE), images, [2, 7])
    with torch.no_grad():
        logits = network(images) - network.fc.bias
    assert torch.allclose(found.contributions.sum(dim=1), logits[[0, 1], [2, 7]], rtol=1e-3, atol=1e-5)
    pooled = found.values.mean(dim=(2, 3)) * network.fc.weight[[2, 7]].detach()
    assert torch.allclose(found.contributions, pooled, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("layer", ["layer1", "layer2.0.bn1"])
def test_maps_and_contributions_are_captums(layer: str) -> None:
    """A ReLU in place follows the batch norm."""
    network, images = build("test_resnet"), noise(SIZE)
    found = compute_feature_maps(network, place(network, layer, SIZE), images, [4, 4])
    module = network.get_submodule(layer)
    activations = LayerActivation(network, module).attribute(images)
    products = LayerGradientXActivation(network, module).attribute(images, 4)
    assert torch.allclose(found.values, activations, atol=1e-5)
    assert torch.allclose(found.strengths, activations.abs().mean(dim=(2, 3)), atol=1e-5)
    assert torch.allclose(found.contributions, products.sum(dim=(2, 3)), atol=1e-5)


def test_tokens_become_maps_without_the_class_token() -> None:
    size = (3, 160, 160)
    network, images = build("test_vit"), noise(size)
    found = compute_feature_maps(network, place(network, "blocks.2", size), images, [0, 1])
    tokens: list[torch.Tensor] = []
    handle = network.blocks[2].register_forward_hook(lambda _, __, output: tokens.append(output.clone()))
    with torch.no_grad():
        network(images)
    handle.remove()
    assert found.values.shape == (2, 64, 10, 10)
    assert torch.allclose(found.values[1, :, 3, 4], tokens[0][1, 1 + 3 * 10 + 4], atol=1e-5)


def test_filters_are_those_of_the_first_convolution() -> None:
    network = build("torchvision/squeezenet1_1")
    name, convolution = find_convolution(network, None)
    filters = read_filters(convolution)
    assert name == "features.0" and filters.is_picture
    assert torch.equal(filters.kernels, convolution.weight)
    assert filters.strengths.tolist() == pytest.approx(convolution.weight.flatten(1).norm(dim=1).tolist())
    assert filters.strengths[filters.order()].diff().le(0).all()


def test_a_filter_that_weight_decay_removed_is_counted() -> None:
    convolution = nn.Conv2d(8, 5, 3)
    with torch.no_grad():
        convolution.weight[3] *= 1e-6
    filters = read_filters(convolution)
    assert filters.num_dead == 1 and filters.is_dead.tolist() == [False, False, False, True, False]
    assert not filters.is_picture and filters.norms.shape == (5, 8)


def test_what_is_no_convolution_is_refused() -> None:
    network = build("torchvision/squeezenet1_1")
    with pytest.raises(UsageError, match="it is no convolution, but Fire") as caught:
        find_convolution(network, "features.3")
    assert "features.3.squeeze" in caught.value.fix
    with pytest.raises(UsageError, match=r"did you mean 'features\.3\.squeeze'"):
        find_convolution(network, "features.3.squeez")
    with pytest.raises(UsageError, match="has no convolution"):
        find_convolution(nn.Sequential(nn.Linear(3, 3)), None)
