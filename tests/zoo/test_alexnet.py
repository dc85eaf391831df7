"""AlexNet of 2012: counts, sizes of the paper, groups, normalisation, and numbers of two other passes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pytorchcv.models.alexnet import alexnet as theirs
from torch import nn

from pretrained.catalog import find_card
from pretrained.zoo.alexnet import AlexNet, make_lrn
from tests.zoo.certify import assert_deviation, build, images, num_parameters, on_meta
from tests.zoo.classics import close, fill, normalise, reaches_every_parameter, shapes

SIZE = (3, 227, 227)
COUNTS = {
    "alexnet_2012": 60_965_224,  # published: "60 million parameters"
    "alexnet_2012_without_7": 60_965_224 - 4096 * 4097,  # this and those below are computed
    "alexnet_2012_without_67": 11_551_080,
    "alexnet_2012_without_34": 59_268_712,
    "alexnet_2012_without_3467": 9_854_568,
}
"""The ablation of Zeiler and Fergus gives no counts. Lectures on it say 16M, 50M and 1M less, the last for
dense convolutions."""


@pytest.mark.parametrize(("name", "number"), COUNTS.items())
def test_counts(name: str, number: int) -> None:
    network = on_meta(name)
    assert num_parameters(network) == number
    assert reaches_every_parameter(network, SIZE)


def test_the_maps_have_the_published_sizes() -> None:
    found = shapes(on_meta("alexnet_2012"), SIZE)
    names = ("conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "conv5", "pool5", "fc6", "fc7", "fc8")
    assert [found[name] for name in names] == [
        *((96, 55, 55), (96, 27, 27), (256, 27, 27), (256, 13, 13), (384, 13, 13), (384, 13, 13)),
        *((256, 13, 13), (256, 6, 6), (4096,), (4096,), (1000,)),
    ]


def test_the_convolutions_have_the_kernels_of_section_3_5() -> None:
    """ "256 kernels of size 5 x 5 x 48", "384 kernels of size 3 x 3 x 256", "3 x 3 x 192" twice.

    So each half sees its own maps in convolutions 2, 4 and 5 only.
    """
    network = on_meta("alexnet_2012")
    convolutions = [network.get_submodule(f"conv{number}") for number in range(1, 6)]
    kernels = [tuple(layer.weight.shape[:3]) for layer in convolutions]
    assert kernels == [(96, 3, 11), (256, 48, 5), (384, 256, 3), (384, 192, 3), (256, 192, 3)]
    assert [layer.groups for layer in convolutions] == [1, 2, 1, 2, 2]


def test_the_normalisation_is_that_of_section_3_3() -> None:
    """A port that gives torch the paper's alpha normalises a fifth as much."""
    x = 100 * images(2, (12, 3, 3)).relu()
    assert close(make_lrn()(x), normalise(x, k=2.0, alpha=1e-4))
    wrong = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0)(x)
    assert not close(wrong, normalise(x, k=2.0, alpha=1e-4))


def small() -> nn.Module:
    network = on_meta("alexnet_2012_without_67", num_classes=7).eval()
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


def test_other_layers_are_not_removed() -> None:
    with pytest.raises(ValueError, match="layers 3, 4, 6 and 7"), torch.device("meta"):
        AlexNet(remove=(5,))


def test_dropout_is_off_in_evaluation_and_halves_in_training() -> None:
    torch.manual_seed(0)
    drop = on_meta("alexnet_2012").drop6
    assert drop(torch.ones(10_000)).eq(0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(drop.eval()(torch.ones(9)), torch.ones(9))


def test_images_are_cut_of_ones_whose_short_side_is_256_pixels() -> None:
    preprocessing = find_card("alexnet_2012").preprocessing
    assert (preprocessing.img_size, int(preprocessing.img_size / preprocessing.crop_pct)) == (227, 256)


def test_other_sizes_are_pooled_before_fc6() -> None:
    assert shapes(on_meta("alexnet_2012"), (3, 160, 160))["fc6"] == (4096,)


# --- with fc6 and fc7 of 32 values -----------------------------------------------------------------


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrained.zoo.alexnet.WIDTH", 32)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", ["alexnet_2012", "zfnet"])
def test_numbers_of_the_fully_connected_layers(name: str) -> None:
    """Maps of 12 x 12 are means of 2 x 2 positions for fc6."""
    network, maps = build(name, num_classes=7).eval(), images(2, (256, 12, 12))
    own = {name: value.detach().double() for name, value in network.named_parameters()}
    x = maps.double().reshape(2, 256, 6, 2, 6, 2).mean((3, 5)).reshape(2, -1)
    for layer in ("fc6", "fc7"):
        x = (x @ own[f"{layer}.weight"].T + own[f"{layer}.bias"]).clamp(min=0)
    with torch.no_grad():
        assert close(network.forward_head(maps, pre_logits=True), x.float())
        assert close(network.forward_head(maps), (x @ own["fc8.weight"].T + own["fc8.bias"]).float())


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("name", "ones"), [("alexnet_2012", ("conv2", "conv4", "conv5", "fc6", "fc7")), ("zfnet", ())]
)
def test_weights_and_biases_begin_as_published(name: str, ones: tuple[str, ...]) -> None:
    for layer, module in build(name).named_children():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert_deviation(module.weight, 0.01)
            assert module.bias.eq(1.0 if layer in ones else 0.0).all()
