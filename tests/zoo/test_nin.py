"""Network in Network: counts, sizes, and numbers of pytorchcv but for its padded pools."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pytorchcv.models.nin_cifar import nin_cifar10 as theirs
from torch import nn

from tests.zoo.certify import (
    assert_deviation,
    assert_gradient_everywhere,
    build,
    images,
    num_parameters,
    on_meta,
    pictures,
)
from tests.zoo.classics import close, reaches_every_parameter, shapes


@pytest.mark.parametrize(
    ("name", "number", "size"),  # computed; ImageNet's is published as a file of 29 MB: 7.6M numbers
    [("nin_cifar", 966_986, (3, 32, 32)), ("nin_imagenet", 7_595_176, (3, 224, 224))],
)
def test_counts(name: str, number: int, size: tuple[int, int, int]) -> None:
    network = on_meta(name)
    assert num_parameters(network) == number
    assert reaches_every_parameter(network, size)


def test_the_maps_have_the_sizes_of_the_authors_files() -> None:
    found = shapes(on_meta("nin_imagenet"), (3, 224, 224))
    assert [found[f"blocks.mlpconv{number}"] for number in range(1, 5)] == [
        *((96, 54, 54), (256, 27, 27), (384, 13, 13), (1024, 6, 6))
    ]
    found = shapes(on_meta("nin_cifar"), (3, 32, 32))
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


def test_numbers_of_imagenet_agree_with_a_second_pass() -> None:
    """The layers of the authors' file in order: kernel, stride and padding; pools of 3 with stride 2."""
    network, x = build("nin_imagenet").eval(), pictures("nin_imagenet", 1)[:, :, :119, :119]
    own = iter(network.parameters())
    y = x
    with torch.no_grad():
        for number, (stride, padding, layers) in enumerate([(4, 0, 3), (1, 2, 3), (1, 1, 3), (1, 1, 3)]):
            y = F.max_pool2d(y, 3, 2, ceil_mode=True) if number else y
            y = F.conv2d(y, next(own), next(own), stride, padding).relu()
            for _ in range(layers - 1):
                weight, bias = next(own), next(own)
                y = (torch.einsum("bchw,dc->bdhw", y, weight[:, :, 0, 0]) + bias[:, None, None]).relu()
        assert close(network(x), y.mean((2, 3)))


# --- first weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "small"),
    [("nin_cifar", ()), ("nin_imagenet", ("mlpconv1.conv1", "mlpconv3.conv1", "classifier"))],
)
def test_weights_begin_with_the_deviations_of_the_authors_files(name: str, small: tuple[str, ...]) -> None:
    for layer, module in build(name).named_modules():
        if isinstance(module, nn.Conv2d):
            assert_deviation(module.weight, 0.01 if layer.endswith(small or ("none",)) else 0.05)
            assert not module.bias.any()


@pytest.mark.parametrize("name", ["nin_cifar", "nin_imagenet"])
def test_the_first_layer_learns(name: str) -> None:
    """With 0.01 in all layers of ImageNet's net the logits of all images were equal to the eighth digit."""
    network, x = build(name), pictures(name, 2)
    logits = network.eval()(x)
    assert logits.std(0).mean() > 1e-4
    nn.functional.cross_entropy(logits, torch.arange(len(x))).backward()
    first = network.blocks.mlpconv1.conv1.weight
    assert 1e-3 < first.grad.norm() / first.norm() < 10


def test_gradient_reaches_every_parameter() -> None:
    assert_gradient_everywhere(build("nin_cifar"), pictures("nin_cifar"))


# --- another classifier ----------------------------------------------------------------------------


def test_a_pooling_that_doubles_the_width_gives_as_many_logits() -> None:
    network = on_meta("nin_cifar", global_pool="catavgmax")
    assert network(torch.zeros(2, 3, 32, 32, device="meta")).shape == (2, 10)


def test_a_new_classifier_has_no_relu() -> None:
    network = build("nin_cifar").eval()
    assert (network(images()) >= 0).all()
    network.reset_classifier(5)
    with torch.no_grad():
        features = network.forward_features(images())
        pooled = network.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, 192)
        assert close(network(images()), network.get_classifier()(pooled))
