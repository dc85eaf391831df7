"""Shake-Shake for CIFAR: "Shake-Shake regularization", arXiv:1705.07485.

As published: x + alpha F(x, W1) + (1 - alpha) F(x, W2), with F = ReLU conv BN ReLU conv BN; alpha is uniform
in (0, 1) in the forward pass of training and a new beta replaces it in the backward pass. In evaluation both
are 0.5. Forward and backward are each ``shake`` (random) or ``even`` (0.5); backward may also ``keep`` alpha.
The draw is one for each image, or one for the batch. The identity is of the raw sum: ReLU is in the branches,
and after the last block. Where the shape changes, the shortcut joins two halves of the channels: 1x1
convolutions of every second position, and of the positions one row and one column before, then batch norm.

Where the paper is silent, as in the authors' code: the stem has 16 channels and batch norm; the first block
of the first stage changes the width only, and has the same two halves at stride 1; ReLU precedes the
shortcut. The network for CIFAR-100 (29 layers, 2x4x64d) has bottlenecks of 4 groups in the same order of
layers.
Decided here, as the paper on squeeze-and-excitation is silent: ``cifar_se_shake_shake`` has one of it in a
block, and it acts on the mixture of both branches.
Where public ports differ: random in evaluation and even in training; a stem of the first stage's width; ReLU
after each sum (pytorchcv), where the identity then reads rectified values; the same draw for forward and
backward.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrained.zoo.base import register
from pretrained.zoo.gates import SQUEEZE_EXCITATION
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
    conv,
    two_convs,
)

PAPER = "arXiv:1705.07485"
GROUPS = 4
ForwardMode: TypeAlias = Literal["shake", "even"]
BackwardMode: TypeAlias = Literal["shake", "even", "keep"]
Level: TypeAlias = Literal["image", "batch"]


class Shake(nn.Module):
    """A random mean of two branches: (B, C, H, W) -> (B, C', H', W').

    Args:
        first: a branch.
        second: a branch of the same form.
        forward_mode: the factor of the forward pass in training.
        backward_mode: the factor of the backward pass in training.
        level: one draw for each image, or one for the batch.
    """

    def __init__(
        self,
        first: nn.Module,
        second: nn.Module,
        forward_mode: ForwardMode = "shake",
        backward_mode: BackwardMode = "shake",
        level: Level = "image",
    ) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.forward_mode, self.backward_mode, self.level = forward_mode, backward_mode, level

    def forward(self, features: Tensor) -> Tensor:
        """Return the mixture: its value has the forward factor, its gradient the backward one."""
        first, second = self.first(features), self.second(features)
        if not self.training:
            return torch.lerp(second, first, 0.5)
        alpha = self._draw(self.forward_mode, first)
        output = torch.lerp(second, first, alpha)
        if self.backward_mode == "keep":
            return output
        beta = self._draw(self.backward_mode, first)
        other = torch.lerp(second, first, beta)
        return other + (output - other).detach()

    def _draw(self, mode: str, features: Tensor) -> Tensor:
        """Return a factor (B, 1, 1, 1) or (1, 1, 1, 1)."""
        shape = (len(features) if self.level == "image" else 1, 1, 1, 1)
        if mode == "shake":
            return torch.rand(shape, device=features.device, dtype=features.dtype)
        return features.new_full(shape, 0.5)

    def extra_repr(self) -> str:
        """Return the modes, for the network's printed form."""
        return f"{self.forward_mode}-{self.backward_mode}-{self.level}"


class TwoPathShortcut(nn.Module):
    """Two halves of the channels, from neighbouring positions: (B, C, H, W) -> (B, C', H', W').

    Args:
        inputs: C.
        outputs: C', even.
        stride: of the block.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.stride = stride
        self.conv1, self.conv2 = conv(inputs, outputs // 2, 1), conv(inputs, outputs // 2, 1)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, features: Tensor) -> Tensor:
        """Return the features on the grid and with the channels of the block's output."""
        features = self.relu(features)
        shifted = F.pad(features, (1, -1, 1, -1))  # one row down and one column right, zeros at the border
        step = self.stride
        paths = self.conv1(features[:, :, ::step, ::step]), self.conv2(shifted[:, :, ::step, ::step])
        output: Tensor = self.bn(torch.cat(paths, dim=1))
        return output


def _branch(shape: BlockShape, *, bottleneck: bool) -> nn.Sequential:
    if not bottleneck:
        return chain("rcbrcb", shape.inputs, two_convs(*shape.sizes))
    # 2x4x64d: 4 groups of 64 channels inside 256 outputs.
    convolutions = bottleneck_convs(*shape.sizes, inner=shape.outputs, groups=GROUPS)
    return chain("rcbrcbrcb", shape.inputs, convolutions)


def cifar_shake_shake(
    depth: int,
    width: int,
    *,
    bottleneck: bool = False,
    forward_mode: ForwardMode = "shake",
    backward_mode: BackwardMode = "shake",
    level: Level = "image",
    in_chans: int = 3,
    **common: Unpack[CommonArguments],
) -> StagedNetwork:
    """Build a Shake-Shake network of two branches.

    Args:
        depth: 6n + 2, or 9n + 2 with bottlenecks.
        width: channels of the first stage's convolutions; of one group with bottlenecks.
        bottleneck: blocks of 1x1, grouped 3x3 and 1x1 convolutions.
        forward_mode: see :class:`Shake`.
        backward_mode: see :class:`Shake`.
        level: see :class:`Shake`.
        in_chans: channels of an image.
        **common: see :func:`build_residual`.

    Raises:
        ValueError: the depth is not of that form.
    """

    def block(shape: BlockShape) -> ResidualBlock:
        first, second = (_branch(shape, bottleneck=bottleneck) for _ in range(2))
        shake = Shake(first, second, forward_mode, backward_mode, level)
        shortcut = TwoPathShortcut(*shape.sizes) if shape.changes_shape else nn.Identity()
        return ResidualBlock(shape, shake, shortcut, after=nn.Identity())

    blocks = cifar_depth(depth, 3 if bottleneck else 2, 2)
    outputs = width * (GROUPS if bottleneck else 1)
    widths = [[outputs * factor] * blocks for factor in (1, 2, 4)]
    stem = cifar_stem(in_chans, 16, "cb")
    return build_residual(stem, 16, widths, block, last=nn.ReLU(), **common)


def _register_all() -> None:
    card = cifar_card(PAPER)
    for width in (32, 64, 96):
        name = f"cifar_shake_shake_26_2x{width}d"
        register(name, cifar_shake_shake, card, depth=26, width=width)
        register(f"{name}_batch", cifar_shake_shake, card, depth=26, width=width, level="batch")
    modes: tuple[tuple[ForwardMode, BackwardMode], ...] = (
        *(("shake", "keep"), ("shake", "even"), ("even", "shake"), ("even", "even")),
    )
    for forward_mode, backward_mode in modes:
        name = f"cifar_shake_shake_26_2x32d_{forward_mode}_{backward_mode}"
        published = {"forward_mode": forward_mode, "backward_mode": backward_mode}
        register(name, cifar_shake_shake, card, depth=26, width=32, **published)
    deep = {"depth": 29, "width": 64, "bottleneck": True}
    register("cifar_shake_shake_29_2x4x64d", cifar_shake_shake, cifar_card(PAPER, 100), **deep)
    with_se = {"depth": 26, "width": 96, "se_reduction": 16}
    register("cifar_se_shake_shake_26_2x96d", cifar_shake_shake, cifar_card(SQUEEZE_EXCITATION), **with_se)


_register_all()
