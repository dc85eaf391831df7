"""Pre-activation networks of CIFAR and the five units, arXiv:1603.05027, figure 4 and table 2."""

import pytest
import torch
from pytorchcv.models.preresnet_cifar import CIFARPreResNet
from torch import Tensor, nn

from pretrained.zoo.preresnet import UnitName, cifar_preresnet
from tests.sweeps import slow_except
from tests.zoo.certify import (
    State,
    assert_gradient_everywhere,
    assert_same_output,
    blocks_of,
    classify,
    conv,
    copy_weights,
    count,
    excite,
    images,
    map_sizes,
    norm,
    on_meta,
    pad_shortcut,
    pytorchcv_preact_name,
    randomise,
)

UNITS: tuple[UnitName, ...] = ("original", "bn_after", "relu_before", "relu_only", "full")


@pytest.mark.sample(1)
@pytest.mark.parametrize("unit", slow_except(["full", "original"], UNITS))
def test_parameters(unit: UnitName) -> None:
    """Published: 1.7 M at depth 110 and 164; exact counts computed.

    Batch norm on the three projections of 164 has 896 parameters, in units whose last convolution has it.
    """
    suffix = "" if unit == "full" else f"_{unit}"
    assert count(f"cifar_preresnet110{suffix}") == 1_727_962
    assert count(f"cifar_preresnet164{suffix}") == 1_703_258 + (0 if unit in ("full", "bn_after") else 896)


@pytest.mark.slow
def test_parameters_of_1001_layers() -> None:
    assert count("cifar_preresnet1001") == 10_327_706  # published: 10.2 M


def test_table_of_layers() -> None:
    basic = on_meta("cifar_preresnet110", depth=20)
    assert map_sizes(basic) == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]
    bottlenecks = on_meta("cifar_preresnet164", depth=29)
    assert map_sizes(bottlenecks) == [(16, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8)]
    assert [len(stage) for stage in on_meta("cifar_preresnet164").stages] == [18, 18, 18]


# --- structure -------------------------------------------------------------------------------------


def test_an_activation_follows_the_last_sum() -> None:
    """The wrong port ends in the sum. In the other forms the activation is in the last unit."""
    endings = {
        unit: [type(layer) for layer in cifar_preresnet(20, unit, bottleneck=False).last] for unit in UNITS
    }
    assert endings["full"] == [nn.BatchNorm2d, nn.ReLU]
    assert endings["relu_only"] == [nn.ReLU]
    assert endings["original"] == endings["bn_after"] == endings["relu_before"] == []


def test_shortcuts_that_change_the_shape_read_the_activated_signal() -> None:
    """The wrong port has them on the raw signal. The first unit too is activated before its paths."""
    network = cifar_preresnet(29)
    for stage, blocks in enumerate(network.stages):
        assert [type(layer) for layer in blocks[0].before] == [nn.BatchNorm2d, nn.ReLU], stage
        assert isinstance(blocks[0].branch[0], nn.Conv2d)
        for block in blocks[1:]:
            assert isinstance(block.before, nn.Identity)
            assert isinstance(block.branch[0], nn.BatchNorm2d)
    basic = cifar_preresnet(20, bottleneck=False)
    assert [type(layer) for layer in basic.stages[0][0].before] == [nn.BatchNorm2d, nn.ReLU]


def test_nothing_follows_the_sum_of_a_pre_activated_unit() -> None:
    block = cifar_preresnet(20, bottleneck=False).stages[0][1].eval()
    features = torch.full((1, 16, 8, 8), -5.0)
    block.branch.conv2.weight.data.zero_()
    with torch.no_grad():
        assert torch.equal(block(features), features)  # an identity, also for negative values


# --- numbers ---------------------------------------------------------------------------------------


def branch_forward(state: State, name: str, x: Tensor, stride: int, unit: UnitName, shared: bool) -> Tensor:
    """The branch of a unit, each step as figure 4 draws it; ``x`` is activated already if ``shared``.

    The first convolution has the stride: 3x3 of a basic unit, 1x1 of a bottleneck.
    """
    convolutions = sum(f"{name}.conv{number}.weight" in state for number in (1, 2, 3))
    norms = iter(range(1, 5))
    for number in range(1, convolutions + 1):
        if unit == "full" and not (shared and number == 1):
            x = torch.relu(norm(state, f"{name}.bn{next(norms)}", x))
        if unit == "relu_only" and not (shared and number == 1):
            x = torch.relu(x)
        x = conv(state, f"{name}.conv{number}", x, stride if number == 1 else 1)
        is_last = number == convolutions
        if unit in ("original", "relu_before", "relu_only") or (unit == "bn_after" and not is_last):
            x = norm(state, f"{name}.bn{next(norms)}", x)
        if unit == "relu_before" or (unit in ("original", "bn_after") and not is_last):
            x = torch.relu(x)
    return x


def project(state: State, name: str, x: Tensor, channels: int, stride: int) -> Tensor:
    """Option A for basic units; for bottlenecks a 1x1 convolution, with batch norm where the unit has it."""
    if f"{name}.conv1.weight" not in state:
        return pad_shortcut(x, channels, stride)
    x = conv(state, f"{name}.conv1", x, stride)
    return norm(state, f"{name}.bn1", x) if f"{name}.bn1.weight" in state else x


def second_forward(state: State, batch: Tensor, unit: UnitName) -> Tensor:
    x = conv(state, "stem.conv1", batch)
    if unit != "full":
        x = norm(state, "stem.bn1", x)
    if unit in ("original", "bn_after", "relu_before"):
        x = torch.relu(x)
    for index, (name, stride) in enumerate(blocks_of(state)):
        shared = unit in ("full", "relu_only") and (index == 0 or stride == 2)
        if shared:
            x = torch.relu(norm(state, f"{name}.before.bn1", x) if unit == "full" else x)
        y = excite(state, name, branch_forward(state, f"{name}.branch", x, stride, unit, shared))
        x = y + project(state, f"{name}.shortcut", x, y.shape[1], stride)
        if unit == "bn_after":
            x = norm(state, f"{name}.after.bn1", x)
        if unit in ("original", "bn_after"):
            x = torch.relu(x)
    if unit == "full":
        x = norm(state, "last.bn1", x)
    if unit in ("full", "relu_only"):
        x = torch.relu(x)
    return classify(state, x)


@pytest.mark.parametrize("se_reduction", [0, 4])
@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("unit", UNITS)
def test_numbers_of_a_second_forward(unit: UnitName, bottleneck: bool, se_reduction: int) -> None:
    torch.manual_seed(0)
    depth = 29 if bottleneck else 20
    network = randomise(cifar_preresnet(depth, unit, bottleneck=bottleneck, se_reduction=se_reduction))
    state = network.state_dict()
    assert any(".se." in name for name in state) == bool(se_reduction)
    assert_same_output(network, lambda batch: second_forward(state, batch, unit), images())


def test_numbers_of_pytorchcv_with_its_stride() -> None:
    """pytorchcv has a bottleneck's stride in the 3x3, the authors in the first 1x1: ours is moved here."""
    torch.manual_seed(0)
    ours = randomise(cifar_preresnet(29))
    for stage in list(ours.stages)[1:]:
        stage[0].branch.conv1.stride, stage[0].branch.conv2.stride = (1, 1), (2, 2)
    theirs = CIFARPreResNet([[64] * 3, [128] * 3, [256] * 3], 16, bottleneck=True)
    copy_weights(ours, theirs, lambda name: pytorchcv_preact_name(shift_shared(name)))
    assert_same_output(ours, theirs, images())


def shift_shared(name: str) -> str:
    """Number a branch's batch norms from 2 where the first one is before both paths."""
    for stage in range(3):
        for number in (2, 1):
            start = f"stages.{stage}.0.branch.bn"
            if name.startswith(f"{start}{number}."):
                return name.replace(f"{start}{number}.", f"{start}{number + 1}.")
    return name


@pytest.mark.parametrize("unit", UNITS)
def test_gradient_reaches_every_parameter(unit: UnitName) -> None:
    torch.manual_seed(0)
    assert_gradient_everywhere(cifar_preresnet(20, unit, bottleneck=False), images(8))
