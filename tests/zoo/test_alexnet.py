"""AlexNet of 2012: counts, sizes of the paper, groups, normalisation, and numbers of two other passes."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from pytorchcv.models.alexnet import alexnet as theirs
from torch import nn

from pretrained.zoo.alexnet import AlexNet, make_lrn
from tests.zoo.certify import images, num_parameters
from tests.zoo.classics import close, fill, normalise, outline, reaches_every_parameter, shapes

SIZE = (3, 227, 227)
COUNTS = {
    "alexnet_2012": 60_965_224,  # published: "60 million parameters"
    "alexnet_2012_without_7": 60_965_224 - 4096 * 4097,  # published (Zeiler and Fergus): 16M less
    "alexnet_2012_without_67": 11_551_080,  # published: 50M less
    "alexnet_2012_without_34": 59_268_712,  # published: 1M less, for dense convolutions of another net
    "alexnet_2012_without_3467": 9_854_568,
}


@pytest.mark.parametrize(("name", "number"), COUNTS.items())
def test_counts(name: str, number: int) -> None:
    network = outline(name)
    assert num_parameters(network) == number
    assert reaches_every_parameter(network, SIZE)


def test_the_maps_have_the_published_sizes() -> None:
    found = shapes(outline("alexnet_2012"), SIZE)
    names = ("conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "conv5", "pool5", "fc6", "fc7", "fc8")
    assert [found[name] for name in names] == [
        *((96, 55, 55), (96, 27, 27), (256, 27, 27), (256, 13, 13), (384, 13, 13), (384, 13, 13)),
        *((256, 13, 13), (256, 6, 6), (4096,), (4096,), (1000,)),
    ]


def test_the_convolutions_have_the_kernels_of_section_3_5() -> None:
    """ "256 kernels of size 5 x 5 x 48", "384 kernels of size 3 x 3 x 256", "3 x 3 x 192" twice."""
    network = outline("alexnet_2012")
    kernels = [tuple(network.get_submodule(f"conv{number}").weight.shape[:3]) for number in range(1, 6)]
    assert kernels == [(96, 3, 11), (256, 48, 5), (384, 256, 3), (384, 192, 3), (256, 192, 3)]


def test_the_normalisation_is_that_of_section_3_3() -> None:
    """A port that gives torch the paper's alpha normalises a fifth as much."""
    x = 100 * images(2, (12, 3, 3)).relu()
    assert close(make_lrn()(x), normalise(x, k=2.0, alpha=1e-4))
    wrong = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0)(x)
    assert not close(wrong, normalise(x, k=2.0, alpha=1e-4))


def test_each_half_sees_its_own_maps_in_convolutions_2_4_and_5_only() -> None:
    network = outline("alexnet_2012")
    assert [network.get_submodule(f"conv{number}").groups for number in range(1, 6)] == [1, 2, 1, 2, 2]


def small() -> nn.Module:
    network = outline("alexnet_2012_without_67", num_classes=7).eval()
    fill(network.children(), gain=0.7)
    return network


def test_numbers_agree_with_the_formulas() -> None:
    network, x = small(), 30 * images(1, SIZE)
    own = dict(network.named_parameters())

    def convolve(number: int, x: torch.Tensor, **arguments: int) -> torch.Tensor:
        return F.conv2d(x, own[f"conv{number}.weight"], own[f"conv{number}.bias"], **arguments).relu()

    with torch.no_grad():
        logits = network(x)
        x = F.max_pool2d(normalise(convolve(1, x, stride=4), 2.0, 1e-4), 3, 2)
        x = F.max_pool2d(normalise(convolve(2, x, padding=2, groups=2), 2.0, 1e-4), 3, 2)
        x = convolve(4, convolve(3, x, padding=1), padding=1, groups=2)
        x = F.max_pool2d(convolve(5, x, padding=1, groups=2), 3, 2)
        assert close(logits, F.linear(x.flatten(1), own["fc8.weight"], own["fc8.bias"]))


def test_numbers_agree_with_pytorchcv() -> None:
    """Theirs has no groups, so that our kernels are blocks of theirs, and a fifth of alpha."""
    network, x = small(), 30 * images(1, SIZE)
    with torch.device("meta"):
        features = theirs().features.eval()
    fill([features])
    units = {1: "stage1.unit1", 2: "stage2.unit1", 3: "stage3.unit1", 4: "stage3.unit2", 5: "stage3.unit3"}
    with torch.no_grad():
        for number, unit in units.items():
            ours, layer = network.get_submodule(f"conv{number}"), features.get_submodule(f"{unit}.conv")
            layer.weight.zero_()
            for group in range(ours.groups):
                rows = slice(
                    group * len(ours.weight) // ours.groups, (group + 1) * len(ours.weight) // ours.groups
                )
                width = ours.weight.shape[1]
                layer.weight[rows, group * width : (group + 1) * width] = ours.weight[rows]
            layer.bias.copy_(ours.bias)
        assert not close(network.forward_features(x), features(x))
        network.norm1.alpha = network.norm2.alpha = 1e-4
        assert close(network.forward_features(x), features(x))


def test_torchvisions_is_another_network() -> None:
    with torch.device("meta"):
        import torchvision

        assert num_parameters(torchvision.models.alexnet()) == 61_100_840 != COUNTS["alexnet_2012"]


def test_other_layers_are_not_removed() -> None:
    with pytest.raises(ValueError, match="layers 3, 4, 6 and 7"), torch.device("meta"):
        AlexNet(remove=(5,))


def test_dropout_is_off_in_evaluation_and_halves_in_training() -> None:
    drop = outline("alexnet_2012").drop6
    assert drop(torch.ones(10_000)).eq(0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(drop.eval()(torch.ones(9)), torch.ones(9))


def test_weights_begin_as_published() -> None:
    network = timm.create_model("alexnet_2012_without_67", num_classes=2)
    assert network.conv3.weight.std().item() == pytest.approx(0.01, rel=0.05)
    ones = {name for name, layer in network.named_children() if hasattr(layer, "bias") and layer.bias[0] == 1}
    assert ones == {"conv2", "conv4", "conv5"}


def test_other_sizes_are_pooled_before_fc6() -> None:
    assert shapes(outline("alexnet_2012"), (3, 160, 160))["fc6"] == (4096,)
