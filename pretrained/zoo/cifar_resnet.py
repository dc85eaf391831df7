"""Residual and plain networks for CIFAR: "Deep Residual Learning", arXiv:1512.03385, section 4.2.

As published: depth 6n + 2; 3x3 convolutions of 16, 32, 64 channels on grids of 32, 16, 8; zero-padded
shortcuts (option A) in all cases, so that a residual network has exactly the parameters of its plain
counterpart.

With stochastic depth (``_sd``, arXiv:1603.09382): survival falls linearly to 0.5; where the shape changes the
shortcut averages 2x2 positions before the zero padding, as that paper has it.

Where the paper is silent: the zeros of option A are behind the old channels; every second row and column
stays.
Otherwise than in the paper, which subtracts the mean of every pixel: the cards have the channels' mean and
deviation, as ResNet's code for Torch.
Where public ports differ: many "ResNet-20" are one of widths 64 to 512 with 11 M parameters, or have
projections (272,474 parameters) or three stages of 9 blocks (0.85 M, which is ResNet-56); pytorchcv has
projections.
"""

from __future__ import annotations

from typing import Unpack

from pretrained.zoo.base import register
from pretrained.zoo.residual import (
    CommonArguments,
    StagedNetwork,
    build_residual,
    cifar_card,
    cifar_depth,
    cifar_stem,
)
from pretrained.zoo.resnet import PAPER, Shortcut, basic_block

STOCHASTIC_DEPTH = "arXiv:1603.09382"


def cifar_resnet(
    depth: int, shortcut: Shortcut = "A", *, in_chans: int = 3, **common: Unpack[CommonArguments]
) -> StagedNetwork:
    """Build a residual or plain network of 6n + 2 layers for CIFAR.

    Args:
        depth: 20, 32, 44, 56, 110, 1202, or any other 6n + 2.
        shortcut: option A as published, ``average`` with stochastic depth, B, or none for a plain network.
        in_chans: channels of an image.
        **common: see :func:`build_residual`.

    Raises:
        ValueError: the depth is not 6n + 2.
    """
    blocks = cifar_depth(depth, 2, 2)
    widths = [[channels] * blocks for channels in (16, 32, 64)]
    stem = cifar_stem(in_chans, 16)
    return build_residual(stem, 16, widths, lambda shape: basic_block(shape, shortcut), **common)


def _register_all() -> None:
    for depth in (20, 32, 44, 56, 110, 1202):
        register(f"cifar_resnet{depth}", cifar_resnet, cifar_card(PAPER), depth=depth)
    for depth in (20, 32, 44, 56, 110):
        register(f"cifar_plain{depth}", cifar_resnet, cifar_card(PAPER), depth=depth, shortcut="none")
    card = cifar_card(STOCHASTIC_DEPTH)
    published = {"shortcut": "average", "drop_path_rate": 0.5}
    for depth in (110, 1202):
        register(f"cifar_resnet{depth}_sd", cifar_resnet, card, depth=depth, **published)


_register_all()
