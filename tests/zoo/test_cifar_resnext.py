"""ResNeXt-29 of CIFAR, arXiv:1611.05431, section 5.4 and table 7."""

import pytest
import torch
from pytorchcv.models.resnext_cifar import CIFARResNeXt

from pretrained.zoo.cifar_resnext import cifar_resnext
from tests.zoo.certify import (
    assert_gradient_everywhere,
    assert_same_output,
    copy_weights,
    count,
    images,
    map_sizes,
    on_meta,
    pytorchcv_name,
    randomise,
)


@pytest.mark.parametrize(
    ("name", "exact", "published"), [("8x64d", 34_426_698, 34.4), ("16x64d", 68_155_210, 68.1)]
)
def test_parameters(name: str, exact: int, published: float) -> None:
    """Published in millions; exact counts computed (68.155 rounds to 68.2, the paper cuts)."""
    assert count(f"cifar_resnext29_{name}") == exact
    assert exact / 1e6 == pytest.approx(published, abs=0.06)


def test_table_of_layers() -> None:
    network = on_meta("cifar_resnext29_8x64d")
    assert map_sizes(network) == [(64, 32, 32), (256, 32, 32), (512, 16, 16), (1024, 8, 8)]
    assert [len(stage) for stage in network.stages] == [3, 3, 3]


def test_groups_are_wider_in_later_stages_and_have_the_stride() -> None:
    """The wrong port keeps the width of the groups."""
    for stage, blocks in enumerate(on_meta("cifar_resnext29_8x64d").stages):
        for index, block in enumerate(blocks):
            grouped = block.branch.conv2
            assert (grouped.groups, grouped.in_channels) == (8, 8 * 64 * 2**stage)
            assert grouped.stride[0] == (2 if stage and not index else 1)
            assert block.branch.conv1.stride == (1, 1)


def test_numbers_of_pytorchcv() -> None:
    torch.manual_seed(0)
    ours = randomise(cifar_resnext(11, 4, 8))
    theirs = CIFARResNeXt([[256], [512], [1024]], 64, 4, 8)
    copy_weights(ours, theirs, pytorchcv_name)
    assert_same_output(ours, theirs, images())


def test_gradient_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    assert_gradient_everywhere(cifar_resnext(11, 4, 8), images(8))
