"""Wide residual networks for CIFAR: "Wide Residual Networks", arXiv:1605.07146.

As published: depth 6n + 4; pre-activated basic blocks of 16k, 32k, 64k channels; dropout between the two
convolutions of a block, behind the second batch norm and ReLU, at 0.3 (CIFAR) or 0.4 (SVHN), or none. Where
the shape changes, the shortcut is a 1x1 convolution of the activated signal, as in the authors' code.

``drop_rate`` is that dropout, 0 by default; there is none before the classifier.
Where public ports differ: dropout on the shortcut, behind the sum or before the classifier, or always at 0.5.
Depth counts the projections' layers as the paper does: WRN-28-10 has 25 3x3 convolutions on its longest path.
"""

from __future__ import annotations

from typing import Unpack

from torch import nn

from pretrained.zoo.base import register
from pretrained.zoo.gates import SQUEEZE_EXCITATION
from pretrained.zoo.residual import (
    BlockShape,
    ResidualArguments,
    ResidualBlock,
    StagedNetwork,
    build_residual,
    chain,
    cifar_card,
    cifar_depth,
    cifar_stem,
    pre_activated_block,
    projection,
    two_convs,
)

PAPER = "arXiv:1605.07146"
PUBLISHED = (
    (40, 1),
    (40, 2),
    (40, 4),
    (40, 8),
    (28, 10),
    (28, 12),
    (22, 8),
    (22, 10),
    (16, 4),
    (16, 8),
    (16, 10),
)
"""Depth and widening factor k of the networks of its tables 4 and 5."""


def wide_block(shape: BlockShape, drop_rate: float) -> ResidualBlock:
    """Return the block: two 3x3 convolutions with dropout between them."""
    shared = shape.changes_shape
    shortcut = projection(*shape.sizes, order="c") if shared else nn.Identity()
    convolutions = two_convs(*shape.sizes)
    return pre_activated_block(shape, "brcbrdc", convolutions, shortcut, shared=shared, drop_rate=drop_rate)


def cifar_wrn(
    depth: int, widen: int, *, in_chans: int = 3, drop_rate: float = 0.0, **common: Unpack[ResidualArguments]
) -> StagedNetwork:
    """Build a wide residual network.

    Args:
        depth: 6n + 4.
        widen: factor k of the widths 16, 32, 64.
        in_chans: channels of an image.
        drop_rate: dropout between the convolutions of a block.
        **common: see :func:`build_residual`.

    Raises:
        ValueError: the depth is not 6n + 4.
    """
    widths = [[channels * widen] * cifar_depth(depth, 2, 4) for channels in (16, 32, 64)]
    return build_residual(
        cifar_stem(in_chans, 16, "c"),
        16,
        widths,
        lambda shape: wide_block(shape, drop_rate),
        last=chain("br", widths[-1][-1]),
        **common,
    )


def _register_all() -> None:
    for depth, widen in PUBLISHED:
        register(f"cifar_wrn_{depth}_{widen}", cifar_wrn, cifar_card(PAPER), depth=depth, widen=widen)
    card = cifar_card(PAPER)
    register("cifar_wrn_28_10_dropout", cifar_wrn, card, depth=28, widen=10, drop_rate=0.3)
    register("cifar_wrn_16_8_dropout_svhn", cifar_wrn, card, depth=16, widen=8, drop_rate=0.4)
    with_se = {"depth": 16, "widen": 8, "se_reduction": 16}
    register("cifar_se_wrn_16_8", cifar_wrn, cifar_card(SQUEEZE_EXCITATION), **with_se)


_register_all()
