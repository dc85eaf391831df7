"""DenseNet and DenseNet-BC for CIFAR: "Densely Connected Convolutional Networks", arXiv:1608.06993.

As published: three dense blocks on grids of 32, 16, 8; a layer is BN ReLU conv3x3 with k outputs (growth
rate), and reads all outputs before it in its block; depth 3n + 4. BC: 1x1 convolutions to 4k channels first
(depth 6n + 4), and transitions that halve the channels. A transition is BN ReLU conv1x1 and 2x2 average
pooling. The stem is a 3x3 convolution of 16 channels, of 2k in BC. Without augmentation there was dropout of
0.2 after each convolution but the first, 0 else: ``drop_rate``, 0 by default; there is none before the
classifier.

Where the paper is silent: batch norm and ReLU before the transition's convolution and after the last block,
as in the authors' code.
Where public ports differ: the authors' later code has a stem of 2k in all forms; torchvision's DenseNet has
the stem of ImageNet; pytorchcv's networks without BC have a stem of 2k and transitions that halve the
channels (599,050 parameters for L = 40, k = 12, published 1.0 M).

Shape legend: B batch, C channels, H W rows and columns, k growth rate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrained.zoo.base import register
from pretrained.zoo.residual import StagedNetwork, chain, cifar_card, cifar_depth, cifar_stem, conv

PAPER = "arXiv:1608.06993"
PLAIN = ((40, 12), (100, 12), (100, 24))
BC = ((100, 12), (250, 24), (190, 40))
"""Depth and growth rate of the networks of its table 2."""
PLAIN_STEM = 16
BOTTLENECK = 4


class DenseLayer(nn.Module):
    """A layer that appends its k outputs to its input: (B, C, H, W) -> (B, C + k, H, W).

    Args:
        inputs: C.
        growth: k.
        bottleneck: a 1x1 convolution to 4k channels comes first.
        drop_rate: dropout after each convolution.
    """

    def __init__(self, inputs: int, growth: int, *, bottleneck: bool, drop_rate: float) -> None:
        super().__init__()
        if bottleneck:
            inner = BOTTLENECK * growth
            convolutions, order = [conv(inputs, inner, 1), conv(inner, growth, 3)], "brcdbrcd"
        else:
            convolutions, order = [conv(inputs, growth, 3)], "brcd"
        self.branch = chain(order, inputs, convolutions, drop_rate)

    def forward(self, features: Tensor) -> Tensor:
        """Return the input and, behind it, the new channels."""
        return torch.cat((features, self.branch(features)), dim=1)


def transition(inputs: int, outputs: int, drop_rate: float) -> nn.Sequential:
    """Return what halves the grid: (B, C, H, W) -> (B, outputs, H / 2, W / 2)."""
    layers = chain("brcd", inputs, [conv(inputs, outputs, 1)], drop_rate)
    layers.add_module("pool", nn.AvgPool2d(2))
    return layers


def cifar_densenet(
    depth: int,
    growth: int,
    *,
    bc: bool = False,
    in_chans: int = 3,
    num_classes: int = 10,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
) -> StagedNetwork:
    """Build a DenseNet or DenseNet-BC.

    Args:
        depth: 3n + 4, in BC 6n + 4.
        growth: k.
        bc: bottlenecks, and transitions that halve the channels.
        in_chans: channels of an image.
        num_classes: K.
        global_pool: ``avg`` or another of timm's poolings.
        drop_rate: dropout after each convolution but the first.

    Raises:
        ValueError: the depth is not of that form.
    """
    layers = cifar_depth(depth, 2 if bc else 1, 4)
    channels = 2 * growth if bc else PLAIN_STEM
    stem = cifar_stem(in_chans, channels, "c")
    stages: list[nn.Sequential] = []
    for block in range(3):
        parts: list[nn.Module] = []
        if block:
            outputs = channels // 2 if bc else channels
            parts.append(transition(channels, outputs, drop_rate))
            channels = outputs
        for _ in range(layers):
            parts.append(DenseLayer(channels, growth, bottleneck=bc, drop_rate=drop_rate))
            channels += growth
        stages.append(nn.Sequential(*parts))
    last = chain("br", channels)
    return StagedNetwork(stem, stages, channels, last=last, num_classes=num_classes, global_pool=global_pool)


def _register_all() -> None:
    for depth, growth in PLAIN:
        register(
            f"cifar_densenet_{depth}_{growth}", cifar_densenet, cifar_card(PAPER), depth=depth, growth=growth
        )
    for depth, growth in BC:
        published = {"depth": depth, "growth": growth, "bc": True}
        register(f"cifar_densenet_bc_{depth}_{growth}", cifar_densenet, cifar_card(PAPER), **published)


_register_all()
