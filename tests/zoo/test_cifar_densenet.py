"""DenseNet and DenseNet-BC of CIFAR, arXiv:1608.06993, table 2."""

import re

import pytest
import torch
from pytorchcv.models.densenet_cifar import CIFARDenseNet
from torch import Tensor, nn
from torch.nn import functional as F

from pretrained.zoo.cifar_densenet import cifar_densenet
from tests.sweeps import slow_except
from tests.zoo.certify import (
    State,
    assert_gradient_everywhere,
    assert_same_output,
    classify,
    conv,
    copy_weights,
    count,
    images,
    map_sizes,
    norm,
    on_meta,
    randomise,
)

# Published in millions; exact counts computed.
PUBLISHED = {
    "40_12": (1_019_722, 1.0),
    "100_12": (6_979_642, 7.0),
    "100_24": (27_249_082, 27.2),
    "bc_100_12": (769_162, 0.8),
    "bc_250_24": (15_324_406, 15.3),
    "bc_190_40": (25_624_430, 25.6),
}


@pytest.mark.parametrize("shape", slow_except(["40_12", "bc_100_12"], PUBLISHED))
def test_parameters(shape: str) -> None:
    exact, published = PUBLISHED[shape]
    assert count(f"cifar_densenet_{shape}") == exact
    assert round(exact / 1e6, 1) == published


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ("40_12", [(16, 32, 32), (160, 32, 32), (304, 16, 16), (448, 8, 8)]),
        pytest.param(
            "bc_100_12", [(24, 32, 32), (216, 32, 32), (300, 16, 16), (342, 8, 8)], marks=pytest.mark.slow
        ),
    ],
)
def test_table_of_layers(shape: str, sizes: list[tuple[int, int, int]]) -> None:
    """Channels behind each block are those before it and k for each layer; BC halves them between."""
    network = on_meta(f"cifar_densenet_{shape}")
    assert map_sizes(network) == sizes
    layers = 12 if shape == "40_12" else 16
    assert [len(stage) for stage in network.stages] == [layers, layers + 1, layers + 1]


def test_dropout_follows_every_convolution_but_the_first() -> None:
    network = cifar_densenet(10, 4, bc=True, drop_rate=0.2)
    dropouts = [module for module in network.modules() if isinstance(module, nn.Dropout) and module.p]
    assert len(dropouts) == sum(isinstance(module, nn.Conv2d) for module in network.modules()) - 1
    for module in network.modules():
        if isinstance(module, nn.Sequential):
            kinds = [type(layer) for layer in module]
            assert all(kinds[at - 1] is nn.Conv2d for at, kind in enumerate(kinds) if kind is nn.Dropout)


def cv_name(name: str) -> str:
    """The written mapping to pytorchcv, whose transitions are no units."""
    stage, block = map(int, m.groups()) if (m := re.match(r"stages\.(\d)\.(\d+)\.", name)) else (-1, -1)
    if stage > 0 and block == 0:
        part, rest = re.fullmatch(r"stages\.\d\.0\.(conv|bn)1\.(.*)", name).groups()  # type: ignore[union-attr]
        return f"features.stage{stage + 1}.trans{stage + 1}.conv.{part}.{rest}"
    unit = block + (1 if stage == 0 else 0)
    name = re.sub(
        r"^stages\.\d\.\d+\.branch\.(conv|bn)(\d)", rf"features.stage{stage + 1}.unit{unit}.conv\2.\1", name
    )
    name = name.replace("stem.conv1.", "features.init_block.").replace("last.bn1.", "features.post_activ.bn.")
    return name.replace("head.fc.", "output.")


def test_numbers_of_pytorchcv_in_bc() -> None:
    torch.manual_seed(0)
    ours = randomise(cifar_densenet(16, 6, bc=True))
    theirs = CIFARDenseNet([[18, 24], [18, 24], [18, 24]], 12, bottleneck=True, dropout_rate=0.0)
    copy_weights(ours, theirs, cv_name)
    assert_same_output(ours, theirs, images())


def second_forward(state: State, batch: Tensor, layers: int) -> Tensor:
    """x_l = H([x_0, ..., x_(l-1)]), without BC. Not of pytorchcv, whose transitions halve the channels."""
    maps = [conv(state, "stem.conv1", batch)]
    for stage in range(3):
        if stage:
            x = torch.relu(norm(state, f"stages.{stage}.0.bn1", torch.cat(maps, 1)))
            maps = [F.avg_pool2d(conv(state, f"stages.{stage}.0.conv1", x), 2)]
        for layer in range(layers):
            name = f"stages.{stage}.{layer + (1 if stage else 0)}.branch"
            maps.append(
                conv(state, f"{name}.conv1", torch.relu(norm(state, f"{name}.bn1", torch.cat(maps, 1))))
            )
    return classify(state, torch.relu(norm(state, "last.bn1", torch.cat(maps, 1))))


def test_numbers_of_a_second_forward() -> None:
    torch.manual_seed(0)
    network = randomise(cifar_densenet(13, 6))
    state = network.state_dict()
    assert_same_output(network, lambda batch: second_forward(state, batch, 3), images())


@pytest.mark.parametrize("bc", [False, True])
def test_gradient_reaches_every_parameter(bc: bool) -> None:
    torch.manual_seed(0)
    assert_gradient_everywhere(cifar_densenet(22, 8, bc=bc), images(8))
