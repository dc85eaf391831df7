"""VGG A-LRN and C: published counts, Table 1, and numbers of torchvision's A and of a second pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from tests.zoo.certify import images, num_parameters
from tests.zoo.classics import close, fill, normalise, outline, reaches_every_parameter, shapes

SIZE = (3, 224, 224)


@pytest.mark.parametrize(
    ("name", "number", "published"), [("vgg11_lrn", 132_863_336, 133), ("vgg16_c", 133_638_952, 134)]
)
def test_counts(name: str, number: int, published: int) -> None:
    """Table 2 gives millions."""
    network = outline(name)
    assert num_parameters(network) == number and round(number / 1e6) == published
    assert reaches_every_parameter(network, SIZE)


def test_c_is_the_column_of_table_1() -> None:
    network = outline("vgg16_c")
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
    network = outline(name).eval()
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
