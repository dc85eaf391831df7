"""Network in Network: counts, sizes, and numbers of pytorchcv but for its padded pools."""

from __future__ import annotations

import math

import pytest
import torch
from pytorchcv.models.nin_cifar import nin_cifar10 as theirs
from torch import nn

from tests.zoo.certify import build, images, num_parameters
from tests.zoo.classics import close, outline, reaches_every_parameter, shapes


@pytest.mark.parametrize(
    ("name", "number", "size"),  # computed; ImageNet's is published as a file of 29 MB: 7.6M numbers
    [("nin_cifar", 966_986, (3, 32, 32)), ("nin_imagenet", 7_595_176, (3, 224, 224))],
)
def test_counts(name: str, number: int, size: tuple[int, int, int]) -> None:
    network = outline(name)
    assert num_parameters(network) == number
    assert reaches_every_parameter(network, size)


def test_the_maps_have_the_sizes_of_the_authors_files() -> None:
    found = shapes(outline("nin_imagenet"), (3, 224, 224))
    assert [found[f"blocks.mlpconv{number}"] for number in range(1, 5)] == [
        *((96, 54, 54), (256, 27, 27), (384, 13, 13), (1024, 6, 6))
    ]
    found = shapes(outline("nin_cifar"), (3, 32, 32))
    assert [found[f"blocks.mlpconv{number}"] for number in (1, 2, 3)] == [
        (96, 32, 32),
        (192, 16, 16),
        (192, 8, 8),
    ]
    assert found["classifier"] == (10, 8, 8)


def test_numbers_agree_with_pytorchcv_but_for_its_padding() -> None:
    network, other, x = build("nin_cifar").eval(), theirs().eval(), images()
    other.load_state_dict(dict(zip(other.state_dict(), network.state_dict().values(), strict=True)))
    with torch.no_grad():
        assert not close(network(x), other(x))
        for pool in (other.features.stage2.pool2, other.features.stage3.pool3):
            pool.padding, pool.ceil_mode = 0, True
        assert close(network(x), other(x))


def test_first_loss_and_gradients() -> None:
    network = build("nin_cifar")
    loss = nn.functional.cross_entropy(network(images(4)), torch.arange(4))
    loss.backward()
    assert abs(loss.item() - math.log(10)) < 0.1 * math.log(10)
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_a_new_classifier_has_no_relu() -> None:
    network = build("nin_cifar").eval()
    assert (network(images()) >= 0).all()
    network.reset_classifier(5)
    with torch.no_grad():
        features = network.forward_features(images())
        pooled = network.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, 192)
        assert close(network(images()), network.get_classifier()(pooled))
