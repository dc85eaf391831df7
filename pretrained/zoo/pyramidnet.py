"""PyramidNet for CIFAR: "Deep Pyramidal Residual Networks", arXiv:1610.02915 (additive).

As published: every one of the N blocks has alpha / N more channels than the one before, rounded down
(equation 2), from 16 to 16 + alpha; a block is BN conv BN ReLU conv BN, with no ReLU before its first
convolution and a batch norm before the sum; shortcuts pad with zeros, and where the grid is halved they
average 2x2 positions. A bottleneck has four times its width behind it.

Decided here: rounding down is of 16 + k alpha / N. Taken literally, the recursion of equation 2 rounds at
every step, and with alpha < N a network would never grow.
Where public ports differ: the authors' code, and pytorchcv, round to the nearest; the published 26.6 M of
depth 200 and 26.8 M of depth 236 are met by rounding down, the 3.8 M of depth 164, alpha 84 by the other
(3.76 M; ours has 3.71 M). The published 28.3 M of depth 110, alpha 270 is 28.5 M in either way, since
alpha / N = 5 there.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Unpack

from torch import nn

from pretrained.zoo.base import register
from pretrained.zoo.residual import (
    BlockShape,
    CommonArguments,
    PadShortcut,
    ResidualBlock,
    StagedNetwork,
    bottleneck_convs,
    build_residual,
    chain,
    cifar_card,
    cifar_depth,
    cifar_stem,
    two_convs,
)

PAPER = "arXiv:1610.02915"
EXPANSION = 4
BASIC = ((110, 48), (110, 84), (110, 270))
BOTTLENECK = ((164, 48), (164, 84), (164, 270), (200, 240), (236, 220), (272, 200))
"""Depth and alpha of the networks of its tables 4 and 5."""


def pyramid_widths(blocks: int, alpha: int) -> list[list[int]]:
    """Return the width of each block of three stages of so many: 16 + k alpha / N, rounded down."""
    total = 3 * blocks
    # A fraction, because a sum of floats may fall just below a whole number.
    widths = [int(16 + Fraction(number * alpha, total)) for number in range(1, total + 1)]
    return [widths[stage * blocks : (stage + 1) * blocks] for stage in range(3)]


def pyramid_block(shape: BlockShape, *, bottleneck: bool) -> ResidualBlock:
    """Return the block; nothing follows its sum."""
    if bottleneck:
        convolutions, order = bottleneck_convs(*shape.sizes, inner=shape.outputs // EXPANSION), "bcbrcbrcb"
    else:
        convolutions, order = two_convs(*shape.sizes), "bcbrcb"
    shortcut = PadShortcut(*shape.sizes, average=True)
    return ResidualBlock(shape, chain(order, shape.inputs, convolutions), shortcut, after=nn.Identity())


def cifar_pyramidnet(
    depth: int, alpha: int, *, bottleneck: bool = False, in_chans: int = 3, **common: Unpack[CommonArguments]
) -> StagedNetwork:
    """Build an additive PyramidNet.

    Args:
        depth: 6n + 2, or 9n + 2 with bottlenecks.
        alpha: channels that the last block has beyond 16 (before expansion).
        bottleneck: blocks of 1x1, 3x3, 1x1 convolutions.
        in_chans: channels of an image.
        **common: see :func:`build_residual`.

    Raises:
        ValueError: the depth is not of that form.
    """
    expansion = EXPANSION if bottleneck else 1
    blocks = cifar_depth(depth, 3 if bottleneck else 2, 2)
    widths = [[width * expansion for width in stage] for stage in pyramid_widths(blocks, alpha)]
    return build_residual(
        cifar_stem(in_chans, 16, "cb"),
        16,
        widths,
        lambda shape: pyramid_block(shape, bottleneck=bottleneck),
        last=chain("br", widths[-1][-1]),
        **common,
    )


def _register_all() -> None:
    for networks, bottleneck in ((BASIC, False), (BOTTLENECK, True)):
        for depth, alpha in networks:
            name = f"cifar_pyramidnet{depth}_a{alpha}{'_bottleneck' if bottleneck else ''}"
            published = {"depth": depth, "alpha": alpha, "bottleneck": bottleneck}
            register(name, cifar_pyramidnet, cifar_card(PAPER), **published)


_register_all()
