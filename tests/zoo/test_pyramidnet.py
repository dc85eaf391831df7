"""PyramidNet of CIFAR, arXiv:1610.02915, equation 2 and tables 4 and 5."""

import pytest
import torch
from pytorchcv.models.pyramidnet_cifar import CIFARPyramidNet
from torch import nn

from pretrained.zoo.pyramidnet import cifar_pyramidnet, pyramid_widths
from tests.sweeps import slow_except
from tests.zoo.certify import (
    assert_gradient_everywhere,
    assert_same_output,
    copy_weights,
    count,
    images,
    map_sizes,
    on_meta,
    pytorchcv_preact_name,
    randomise,
)

# Published in millions; exact counts computed with widths rounded down. Rounded to the nearest, as in public
# ports, they are 1.773, 3.904, 28.485 M, and 1.715, 3.757, 27.216, 26.753, 26.969, 26.211 M with bottlenecks.
PUBLISHED = {
    "110_a48": (1_739_730, 1.7),
    "110_a84": (3_855_054, 3.8),
    "110_a270": (28_485_477, 28.3),
    "164_a48_bottleneck": (1_684_002, 1.7),
    "164_a84_bottleneck": (3_710_550, 3.8),
    "164_a270_bottleneck": (27_216_021, 27.0),
    "200_a240_bottleneck": (26_617_000, 26.6),
    "236_a220_bottleneck": (26_806_528, 26.8),
    "272_a200_bottleneck": (26_049_562, 26.0),
}


@pytest.mark.parametrize("shape", slow_except(["110_a48", "164_a48_bottleneck"], PUBLISHED))
def test_parameters(shape: str) -> None:
    exact, published = PUBLISHED[shape]
    assert count(f"cifar_pyramidnet{shape}") == exact
    rounded_otherwise = shape in ("110_a48", "164_a84_bottleneck")
    assert exact / 1e6 == pytest.approx(published, rel=0.024 if rounded_otherwise else 0.015)


def test_widths_are_rounded_down_and_reach_16_plus_alpha() -> None:
    for blocks, alpha in ((18, 48), (18, 84), (18, 270), (22, 240)):
        widths = [width for stage in pyramid_widths(blocks, alpha) for width in stage]
        assert widths == [16 + number * alpha // (3 * blocks) for number in range(1, 3 * blocks + 1)]
        assert widths[-1] == 16 + alpha
    assert pyramid_widths(18, 48)[0][:3] == [16, 17, 18]  # 16.9, 17.8, 18.7; the nearest are 17, 18, 19


def test_table_of_layers() -> None:
    """Stages end at a third, two thirds and all of alpha, at any depth."""
    sizes = map_sizes(on_meta("cifar_pyramidnet110_a270", depth=20))
    assert sizes == [(16, 32, 32), (106, 32, 32), (196, 16, 16), (286, 8, 8)]


def test_a_block_has_no_relu_first_and_batch_norm_last() -> None:
    network = cifar_pyramidnet(20, 12)
    for stage in network.stages:
        for block in stage:
            kinds = [type(layer).__name__ for layer in block.branch]
            assert kinds == ["BatchNorm2d", "Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "BatchNorm2d"]
            assert isinstance(block.after, nn.Identity)
    assert [type(layer) for layer in network.last] == [nn.BatchNorm2d, nn.ReLU]


def cv_name(name: str, last_norm: int) -> str:
    """The batch norm before the sum is of the unit in pytorchcv, and not of a convolution."""
    if f".branch.bn{last_norm}." in name:
        return pytorchcv_preact_name(name.replace(f".branch.bn{last_norm}.", ".bn."))
    return pytorchcv_preact_name(name).replace("init_block.weight", "init_block.conv.weight")


@pytest.mark.parametrize(("depth", "bottleneck"), [(20, False), (29, True)])
def test_numbers_of_pytorchcv_with_our_widths(depth: int, bottleneck: bool) -> None:
    """pytorchcv rounds to the nearest width, the paper down; it is given ours."""
    torch.manual_seed(0)
    ours = randomise(cifar_pyramidnet(depth, 20, bottleneck=bottleneck))
    factor = 4 if bottleneck else 1
    widths = [[width * factor for width in stage] for stage in pyramid_widths(3, 20)]
    theirs = CIFARPyramidNet(widths, 16, bottleneck=bottleneck)
    copy_weights(ours, theirs, lambda name: cv_name(name, 4 if bottleneck else 3))
    assert_same_output(ours, theirs, images())


def test_gradient_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    assert_gradient_everywhere(cifar_pyramidnet(20, 12), images(8))
