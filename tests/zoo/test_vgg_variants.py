"""VGG A-LRN and C: published counts, Table 1, and numbers of torchvision's A and of a second pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from tests.zoo.certify import assert_deviation, build, images, num_parameters, on_meta
from tests.zoo.classics import close, fill, normalise, reaches_every_parameter, shapes

SIZE = (3, 224, 224)


@pytest.mark.parametrize(
    ("name", "number", "published"), [("vgg11_lrn", 132_863_336, 133), ("vgg16_c", 133_638_952, 134)]
)
def test_counts(name: str, number: int, published: int) -> None:
    """Table 2 gives millions."""
    network = on_meta(name)
    assert num_parameters(network) == number and round(number / 1e6) == published
    assert reaches_every_parameter(network, SIZE)


def test_c_is_the_column_of_table_1() -> None:
    network = on_meta("vgg16_c")
    found = shapes(network, SIZE)
    assert [found[f"block{number}"] for number in range(1, 6)] == [
        *((64, 112, 112), (128, 56, 56), (256, 28, 28), (512, 14, 14), (512, 7, 7))
    ]
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    kernels = [(layer.kernel_size[0], layer.out_channels) for layer in convolutions]
    assert kernels == [
        *[(3, 64)] * 2,
        *[(3, 128)] * 2,
        *[(3, 256), (3, 256), (1, 256)],
        *[(3, 512), (3, 512), (1, 512)] * 2,
    ]


def blocks(name: str) -> nn.Module:
    network = on_meta(name).eval()
    fill(module for child, module in network.named_children() if child.startswith("block"))
    return network


def test_a_with_normalisation_is_torchvisions_a_after_its_first_layer() -> None:
    network, x = blocks("vgg11_lrn"), images(1, (3, 64, 64))
    with torch.device("meta"):
        features = torchvision.models.vgg11(init_weights=False).features.eval()
    fill([features])
    own = {name: value for name, value in network.state_dict().items() if name.startswith("block")}
    features.load_state_dict(dict(zip(features.state_dict(), own.values(), strict=True)))
    with torch.no_grad():
        expected = features[2:](normalise(features[:2](x), k=2.0, alpha=1e-4))
        assert close(network.forward_features(x), expected)
        network.block1.norm = nn.Identity()
        assert close(network.forward_features(x), features(x))


def test_numbers_of_c_agree_with_the_table() -> None:
    network, x = blocks("vgg16_c"), images(1, (3, 64, 64))
    own = iter([value for name, value in network.named_parameters() if name.startswith("block")])
    y = x
    with torch.no_grad():
        for kernels in ((3, 3), (3, 3), (3, 3, 1), (3, 3, 1), (3, 3, 1)):
            for kernel in kernels:
                y = F.conv2d(y, next(own), next(own), padding=kernel // 2).relu()
            y = F.max_pool2d(y, 2)
        assert close(network.forward_features(x), y)


# --- with fc6 and fc7 of 32 values -----------------------------------------------------------------


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrained.zoo.vgg_variants.HIDDEN", 32)


@pytest.mark.usefixtures("narrow")
def test_numbers_of_the_fully_connected_layers() -> None:
    """Maps of 14 x 14 are means of 2 x 2 positions for fc6."""
    network, maps = build("vgg16_c", num_classes=7).eval(), images(2, (512, 14, 14))
    own = {name: value.detach().double() for name, value in network.named_parameters()}
    x = maps.double().reshape(2, 512, 7, 2, 7, 2).mean((3, 5)).reshape(2, -1)
    for layer in ("fc6", "fc7"):
        x = (x @ own[f"{layer}.weight"].T + own[f"{layer}.bias"]).clamp(min=0)
    with torch.no_grad():
        assert close(network.forward_head(maps, pre_logits=True), x.float())
        assert close(network.forward_head(maps), (x @ own["fc8.weight"].T + own["fc8.bias"]).float())


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", ["vgg11_lrn", "vgg16_c"])
def test_weights_begin_with_a_fixed_deviation_or_by_the_rule_of_glorot(name: str) -> None:
    for module in build(name).modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            positions = module.weight[0, 0].numel()
            fans = positions * (module.weight.shape[0] + module.weight.shape[1])
            assert_deviation(module.weight, 0.01 if name == "vgg11_lrn" else (2 / fans) ** 0.5)
            assert not module.bias.any()
