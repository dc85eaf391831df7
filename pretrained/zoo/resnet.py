"""Residual and plain networks for ImageNet as first published: "Deep Residual Learning", arXiv:1512.03385.

As published: 7x7 convolution of stride 2 and 3x3 max pooling; four stages of 64 to 512 channels (four times
as many behind a bottleneck); stride 2 in the first convolution of a stage, which in a bottleneck is the 1x1;
shortcuts with zero padding (A) or a projection where the shape changes (B). A plain network is the same
without shortcuts. The 34-layer nets were published with A, B and C, deeper ones with B. ``resnet18_b`` and
``resnet34_b`` are here as the counterparts of ``_a``: they equal torchvision's ``resnet18`` and ``resnet34``.

Where the paper is silent: the zeros of option A are behind the old channels, and a coarser grid keeps every
second row and column, as in the code that the authors name (fb.resnet.torch).
Where public ports differ: torchvision's and timm's ResNet-50 to 152 have the stride in the 3x3 ("v1.5"), and
neither has option A or the plain networks. Parameter counts cannot tell the place of the stride.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, Unpack

from torch import nn

from pretrained.zoo.base import make_card, register
from pretrained.zoo.residual import (
    BlockShape,
    CommonArguments,
    PadShortcut,
    ResidualBlock,
    StagedNetwork,
    bottleneck_convs,
    build_residual,
    chain,
    conv,
    projection,
    two_convs,
)

PAPER = "arXiv:1512.03385"
STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""Blocks of every stage by depth, table 1 of the paper. Blocks of 50 layers and more are bottlenecks."""

Shortcut: TypeAlias = Literal["A", "B", "average", "none"]
"""Where the shape changes: zero padding (A), the same with average pooling, a projection (B); none: plain."""


def make_shortcut(shape: BlockShape, option: Shortcut) -> nn.Module | None:
    """Return the shortcut of a block; the identity where the shape stays, None for a plain network."""
    if option == "none":
        return None
    if not shape.changes_shape:
        return nn.Identity()
    if option == "B":
        return projection(*shape.sizes)
    return PadShortcut(*shape.sizes, average=option == "average")


def basic_block(shape: BlockShape, shortcut: Shortcut) -> ResidualBlock:
    """Return the block of two 3x3 convolutions."""
    convolutions = two_convs(*shape.sizes)
    return ResidualBlock(shape, chain("cbrcb", shape.inputs, convolutions), make_shortcut(shape, shortcut))


def bottleneck_block(shape: BlockShape, shortcut: Shortcut) -> ResidualBlock:
    """Return the block of 1x1, 3x3 and 1x1 convolutions, with the stride in the first."""
    inner = shape.outputs // 4
    convolutions = bottleneck_convs(*shape.sizes, inner=inner, stride_first=True)
    return ResidualBlock(shape, chain("cbrcbrcb", shape.inputs, convolutions), make_shortcut(shape, shortcut))


def resnet(
    depth: int, shortcut: Shortcut = "B", *, in_chans: int = 3, **common: Unpack[CommonArguments]
) -> StagedNetwork:
    """Build a residual or plain network for ImageNet.

    Args:
        depth: 18, 34, 50, 101 or 152.
        shortcut: option A or B, or none for a plain network.
        in_chans: channels of an image.
        **common: see :func:`build_residual`.
    """
    stem = chain("cbr", in_chans, [conv(in_chans, 64, 7, stride=2)])
    stem.add_module("pool", nn.MaxPool2d(3, stride=2, padding=1))
    is_deep = depth >= 50
    widths = [
        [channels * (4 if is_deep else 1)] * blocks
        for channels, blocks in zip((64, 128, 256, 512), STAGES[depth], strict=True)
    ]
    make_block = bottleneck_block if is_deep else basic_block
    return build_residual(stem, 64, widths, lambda shape: make_block(shape, shortcut), **common)


def _register_all() -> None:
    card = make_card((3, 224, 224), paper=PAPER, classifier="head.fc", first_conv="stem.conv1")
    for depth in (18, 34):
        register(f"plain{depth}", resnet, card, depth=depth, shortcut="none")
        register(f"resnet{depth}_a", resnet, card, depth=depth, shortcut="A")
        register(f"resnet{depth}_b", resnet, card, depth=depth, shortcut="B")
    for depth in (50, 101, 152):
        register(f"resnet{depth}_v1", resnet, card, depth=depth, shortcut="B")


_register_all()
