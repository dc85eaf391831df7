"""Wide residual networks of CIFAR, arXiv:1605.07146, tables 1, 4 and 5."""

import pytest
import torch
from pytorchcv.models.wrn_cifar import CIFARWRN
from torch import nn

from pretrained.zoo.wide_resnet import cifar_wrn
from tests.sweeps import slow_except
from tests.zoo.certify import (
    assert_gradient_everywhere,
    assert_same_output,
    build,
    copy_weights,
    count,
    images,
    map_sizes,
    on_meta,
    pytorchcv_preact_name,
    randomise,
)

# Published in millions; exact counts computed.
PUBLISHED = {
    "40_1": (563_930, 0.6),
    "40_2": (2_243_546, 2.2),
    "40_4": (8_949_210, 8.9),
    "40_8": (35_748_314, 35.7),
    "28_10": (36_479_194, 36.5),
    "28_12": (52_517_850, 52.5),
    "22_8": (17_158_106, 17.2),
    "22_10": (26_797_914, 26.8),
    "16_8": (10_961_370, 11.0),
    "16_10": (17_116_634, 17.1),
}


@pytest.mark.parametrize("shape", slow_except(["40_1", "28_10", "16_8"], PUBLISHED))
def test_parameters(shape: str) -> None:
    exact, published = PUBLISHED[shape]
    assert count(f"cifar_wrn_{shape}") == exact
    assert round(exact / 1e6, 1) == published


def test_table_of_layers() -> None:
    """Table 1: widths 16k, 32k, 64k behind a stem of 16."""
    network = on_meta("cifar_wrn_28_10")
    assert map_sizes(network) == [(16, 32, 32), (160, 32, 32), (320, 16, 16), (640, 8, 8)]
    assert [len(stage) for stage in network.stages] == [4, 4, 4]
    kernels = [m.kernel_size[0] for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert (kernels.count(3), kernels.count(1)) == (25, 3)  # 28 convolutions


def dropouts(network: nn.Module) -> list[str]:
    return [name for name, m in network.named_modules() if isinstance(m, nn.Dropout) and m.p > 0]


@pytest.mark.parametrize(
    ("name", "rate"), [("cifar_wrn_28_10_dropout", 0.3), ("cifar_wrn_16_8_dropout_svhn", 0.4)]
)
def test_dropout_is_between_the_convolutions(name: str, rate: float) -> None:
    """The wrong ports: on the shortcut, behind the sum, before the classifier, or at 0.5."""
    network = on_meta(name)
    assert all(found.endswith("branch.drop1") for found in dropouts(network))
    for stage in network.stages:
        for block in stage:
            order = [name for name, _ in block.branch.named_children()]
            norm = "bn1" if "bn2" not in order else "bn2"
            assert order[order.index("conv1") :] == [
                "conv1",
                norm,
                norm.replace("bn", "relu"),
                "drop1",
                "conv2",
            ]
            assert block.branch.drop1.p == rate
    assert dropouts(on_meta("cifar_wrn_28_10")) == []


def test_dropout_is_off_in_evaluation_and_drops_as_stated_in_training() -> None:
    torch.manual_seed(0)
    block = cifar_wrn(10, 1, drop_rate=0.3).stages[0][0]
    ones = torch.ones(10_000)
    dropped = float((block.branch.drop1(ones) == 0).float().mean())
    assert dropped == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 10_000) ** 0.5)
    assert torch.equal(block.eval().branch.drop1(ones), ones)


def shift_shared(name: str) -> str:
    """Number a branch's second batch norm 2 where the first one is before both paths."""
    for stage in range(3):
        name = name.replace(f"stages.{stage}.0.branch.bn1.", f"stages.{stage}.0.branch.bn2.")
    return name


def test_numbers_of_pytorchcv() -> None:
    torch.manual_seed(0)
    ours = randomise(cifar_wrn(16, 2))
    theirs = CIFARWRN([[32] * 2, [64] * 2, [128] * 2], 16)
    copy_weights(ours, theirs, lambda name: pytorchcv_preact_name(shift_shared(name)))
    assert_same_output(ours, theirs, images())


def test_gradient_reaches_every_parameter() -> None:
    assert_gradient_everywhere(build("cifar_wrn_16_4", drop_rate=0.3), images(4))
