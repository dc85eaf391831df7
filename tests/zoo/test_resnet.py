"""ResNet v1 and plain networks of ImageNet, arXiv:1512.03385, table 1."""

import pytest
import torch
import torchvision
from pytorchcv.models.resnet import ResNet
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.sweeps import slow_except
from tests.zoo.certify import (
    State,
    assert_gradient_everywhere,
    assert_same_output,
    blocks_of,
    build,
    classify,
    conv,
    copy_weights,
    count,
    images,
    map_sizes,
    norm,
    on_meta,
    pad_shortcut,
    pytorchcv_name,
    randomise,
)

IMAGENET = (3, 224, 224)

# Computed; those of option B are also torchvision's and timm's. The paper publishes operations (below).
PARAMETERS = {
    "plain18": 11_515_688,
    "resnet18_a": 11_515_688,  # option A adds none to the plain network
    "resnet18_b": 11_689_512,
    "plain34": 21_623_848,
    "resnet34_a": 21_623_848,
    "resnet34_b": 21_797_672,
    "resnet50_v1": 25_557_032,
    "resnet101_v1": 44_549_160,
    "resnet152_v1": 60_192_808,
}


@pytest.mark.parametrize("name", slow_except(["plain18", "resnet18_b", "resnet50_v1"], PARAMETERS))
def test_parameters(name: str) -> None:
    assert count(name) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("plain18", 1.8),
        pytest.param("resnet34_a", 3.6, marks=pytest.mark.slow),
        ("resnet50_v1", 3.8),
        pytest.param("resnet101_v1", 7.6, marks=pytest.mark.slow),
        pytest.param("resnet152_v1", 11.3, marks=pytest.mark.slow),
    ],
)
def test_operations(name: str, published: float) -> None:
    """The last row of table 1, in 1e9 multiply-adds; with the stride in the 3x3: 4.1, 7.8, 11.5."""
    network = on_meta(name).eval()
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network(torch.empty(1, *IMAGENET))
    assert counter.get_total_flops() / 2e9 == pytest.approx(published, abs=0.06)


@pytest.mark.parametrize(("name", "expansion"), [("plain34", 1), ("resnet34_a", 1), ("resnet50_v1", 4)])
def test_table_of_layers(name: str, expansion: int) -> None:
    network = on_meta(name)
    stages = [
        (64 * expansion, 56, 56),
        (128 * expansion, 28, 28),
        (256 * expansion, 14, 14),
        (512 * expansion, 7, 7),
    ]
    assert map_sizes(network, IMAGENET) == [(64, 56, 56), *stages]
    assert [len(stage) for stage in network.stages] == [3, 4, 6, 3]
    assert network.stem.conv1.kernel_size == (7, 7)


def test_a_bottleneck_has_its_stride_in_the_first_convolution() -> None:
    """The wrong port is v1.5, with the stride in the 3x3; parameter counts do not tell it."""
    for stage in list(on_meta("resnet50_v1").stages)[1:]:
        branch = stage[0].branch
        strides = [layer.stride[0] for layer in branch if isinstance(layer, nn.Conv2d)]
        assert strides == [2, 1, 1]


def second_forward(state: State, batch: Tensor, *, residual: bool) -> Tensor:
    x = torch.relu(norm(state, "stem.bn1", conv(state, "stem.conv1", batch, 2)))
    x = torch.nn.functional.max_pool2d(x, 3, 2, 1)
    for name, stride in blocks_of(state):
        y = torch.relu(norm(state, f"{name}.branch.bn1", conv(state, f"{name}.branch.conv1", x, stride)))
        y = norm(state, f"{name}.branch.bn2", conv(state, f"{name}.branch.conv2", y))
        x = torch.relu(y + pad_shortcut(x, y.shape[1], stride)) if residual else torch.relu(y)
    return classify(state, x)


@pytest.mark.parametrize("name", ["plain18", "resnet18_a"])
def test_numbers_of_a_second_forward(name: str) -> None:
    network = randomise(build(name))
    state, residual = network.state_dict(), name != "plain18"
    batch = images(1, (3, 64, 64))
    assert_same_output(network, lambda batch: second_forward(state, batch, residual=residual), batch)


@pytest.mark.sample(1)
def test_numbers_of_pytorchcv() -> None:
    """pytorchcv too has v1, with ``conv1_stride``."""
    ours = randomise(build("resnet50_v1"))
    widths = [[width] * blocks for width, blocks in zip((256, 512, 1024, 2048), (3, 4, 6, 3), strict=True)]
    theirs = ResNet(widths, 64, bottleneck=True, conv1_stride=True)
    copy_weights(ours, theirs, lambda name: pytorchcv_name(name).replace("init_block.", "init_block.conv."))
    assert_same_output(ours, theirs, images(1, IMAGENET))


@pytest.mark.parametrize("depth", [18, pytest.param(34, marks=pytest.mark.slow)])
def test_option_b_is_torchvisions_network(depth: int) -> None:
    ours = randomise(build(f"resnet{depth}_b"))
    with torch.device("meta"):
        theirs = torchvision.models.get_model(f"resnet{depth}").eval()
    state = dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True))
    theirs.load_state_dict(state, assign=True)
    batch = images(1, (3, 64, 64))
    with torch.no_grad():
        assert torch.equal(ours(batch), theirs(batch))


@pytest.mark.parametrize("name", ["plain18", "resnet18_a"])
def test_gradient_reaches_every_parameter(name: str) -> None:
    assert_gradient_everywhere(build(name), images(4, (3, 64, 64)))
