"""ResNeXt-29 for CIFAR: "Aggregated Residual Transformations", arXiv:1611.05431, section 5.4.

As published: depth 9n + 2 with n = 3; 3x3 convolution of 64 channels; bottlenecks with 256, 512, 1,024
outputs whose 3x3 convolution has ``cardinality`` groups of ``width`` channels (twice and four times as many
in later stages) and the stride; projections where the shape changes.

Decided here: the form (c) of its figure 3, one grouped convolution, as in the authors' code.
Where public ports differ: some keep the width of the groups in later stages.
"""

from __future__ import annotations

from typing import Unpack

from pretrained.zoo.base import register
from pretrained.zoo.residual import (
    BlockShape,
    CommonArguments,
    ResidualBlock,
    StagedNetwork,
    bottleneck_convs,
    build_residual,
    chain,
    cifar_card,
    cifar_depth,
    cifar_stem,
)
from pretrained.zoo.resnet import make_shortcut

PAPER = "arXiv:1611.05431"
FIRST_OUTPUTS = 256


def resnext_block(shape: BlockShape, cardinality: int, width: int) -> ResidualBlock:
    """Return a bottleneck whose 3x3 convolution has ``cardinality`` groups."""
    inner = cardinality * width * shape.outputs // FIRST_OUTPUTS
    convolutions = bottleneck_convs(*shape.sizes, inner=inner, groups=cardinality)
    return ResidualBlock(shape, chain("cbrcbrcb", shape.inputs, convolutions), make_shortcut(shape, "B"))


def cifar_resnext(
    depth: int, cardinality: int, width: int, *, in_chans: int = 3, **common: Unpack[CommonArguments]
) -> StagedNetwork:
    """Build a ResNeXt for CIFAR.

    Args:
        depth: 9n + 2.
        cardinality: groups of the 3x3 convolutions.
        width: channels of a group in the first stage.
        in_chans: channels of an image.
        **common: see :func:`build_residual`.

    Raises:
        ValueError: the depth is not 9n + 2.
    """
    widths = [[FIRST_OUTPUTS * factor] * cifar_depth(depth, 3, 2) for factor in (1, 2, 4)]
    stem = cifar_stem(in_chans, 64)
    return build_residual(stem, 64, widths, lambda shape: resnext_block(shape, cardinality, width), **common)


def _register_all() -> None:
    for cardinality in (8, 16):
        shape = {"depth": 29, "cardinality": cardinality, "width": 64}
        register(f"cifar_resnext29_{cardinality}x64d", cifar_resnext, cifar_card(PAPER), **shape)


_register_all()
