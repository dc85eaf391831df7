"""The vocabulary of residual networks: branches, shortcuts, the block, and the trunk that all families share.

A block is ``after(shortcut(x) + gate(branch(x)))`` with ``x = before(input)``. A family of papers is a choice
of these parts, and its file is short. A branch is written as its layers in order, one letter each::

    cbrcb    convolution, batch norm, ReLU, convolution, batch norm     ResNet, arXiv:1512.03385
    brcbrc   the same before the convolutions                          pre-activation, arXiv:1603.05027
    bcbrcb   no ReLU before the first                                   PyramidNet, arXiv:1610.02915

The trunk is a stem, stages of blocks (the first block of each later stage halves the grid) and a head that
pools and classifies. Any block can be gated by squeeze-and-excitation and stochastic depth
(:mod:`pretrained.zoo.gates`), with the arguments ``se_reduction`` and ``drop_path_rate`` of any such network.

As in ResNet's code for Torch (fb.resnet.torch) and the authors' codes that are built on it: convolutions have
no bias, their weights are normal with variance 2 / (rows * columns * output channels) (arXiv:1502.01852),
batch norms start at 1 and 0, and the bias of the classifier at 0.

Shape legend: B batch, C channels, H W rows and columns, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict

from timm.models._pretrained import PretrainedCfg
from torch import Tensor, nn
from torch.nn import functional as F

from pretrained.zoo.base import CIFAR_MEAN, CIFAR_STD, PooledNetwork, make_card
from pretrained.zoo.gates import SqueezeExcitation, StochasticDepth, linear_survival

StageWidths: TypeAlias = Sequence[Sequence[int]]
"""Output channels of every block of every stage."""


# --- branches --------------------------------------------------------------------------------------


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Return a convolution without bias that keeps the grid at stride 1."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


def two_convs(inputs: int, outputs: int, stride: int) -> list[nn.Conv2d]:
    """Return the two 3x3 convolutions of a basic block."""
    return [conv(inputs, outputs, 3, stride), conv(outputs, outputs, 3)]


def bottleneck_convs(
    inputs: int, outputs: int, stride: int, *, inner: int, groups: int = 1, stride_first: bool = False
) -> list[nn.Conv2d]:
    """Return the convolutions 1x1, 3x3, 1x1 of a bottleneck.

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        stride: of the block.
        inner: channels of the 3x3 convolution.
        groups: of the 3x3 convolution.
        stride_first: the first 1x1 convolution has the stride, as in arXiv:1512.03385; else the 3x3 has it.
    """
    first, second = (stride, 1) if stride_first else (1, stride)
    return [conv(inputs, inner, 1, first), conv(inner, inner, 3, second, groups), conv(inner, outputs, 1)]


def chain(
    order: str, channels: int, convolutions: Sequence[nn.Conv2d] = (), drop_rate: float = 0.0
) -> nn.Sequential:
    """Return layers in the given order, named ``conv1``, ``bn1``, ``relu1``, ``conv2`` and so on.

    Args:
        order: one letter a layer: ``c`` the next convolution, ``b`` batch norm, ``r`` ReLU, ``d`` dropout.
        channels: of the input.
        convolutions: as many as there are ``c``.
        drop_rate: probability that dropout sets an element to zero in training.
    """
    remaining = iter(convolutions)
    layers = nn.Sequential()
    for position, letter in enumerate(order):
        number = order[: position + 1].count(letter)
        if letter == "c":
            layers.add_module(f"conv{number}", convolution := next(remaining))
            channels = convolution.out_channels
        elif letter == "b":
            layers.add_module(f"bn{number}", nn.BatchNorm2d(channels))
        elif letter == "r":
            layers.add_module(f"relu{number}", nn.ReLU())
        else:
            layers.add_module(f"drop{number}", nn.Dropout(drop_rate))
    return layers


# --- shortcuts -------------------------------------------------------------------------------------


class PadShortcut(nn.Module):
    """Identity with zeros for the new channels: (B, C, H, W) -> (B, outputs, H / stride, W / stride).

    Option A of arXiv:1512.03385. It has no parameters. The zeros are behind the old channels.

    Args:
        inputs: C.
        outputs: channels of the block's output, at least C.
        stride: of the block.
        average: a coarser grid has the means of stride x stride positions (arXiv:1603.09382,
            arXiv:1610.02915), else every ``stride``-th row and column.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, *, average: bool = False) -> None:
        super().__init__()
        self.added, self.stride = outputs - inputs, stride
        # A convolution of stride 2 makes 4 positions of 7; so does this pool, whose last is of fewer.
        self.pool = nn.AvgPool2d(stride, ceil_mode=True) if average and stride > 1 else None

    def forward(self, features: Tensor) -> Tensor:
        """Return the features on the grid and with the channels of the block's output."""
        if self.pool is not None:
            features = self.pool(features)
        elif self.stride > 1:
            features = features[:, :, :: self.stride, :: self.stride]
        return F.pad(features, (0, 0, 0, 0, 0, self.added)) if self.added else features


def projection(inputs: int, outputs: int, stride: int, order: str = "cb") -> nn.Sequential:
    """Return a 1x1 convolution, by default with batch norm: option B of arXiv:1512.03385."""
    return chain(order, inputs, [conv(inputs, outputs, 1, stride)])


# --- the block -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockShape:
    """The shape of a block, where it stands, and its gates.

    Attributes:
        inputs: channels of its input.
        outputs: channels of its output.
        stride: 2 in the first block of every stage but the first, else 1.
        is_first: whether it is the first block of the network.
        survival: probability that stochastic depth keeps its branch.
        se_reduction: reduction of squeeze-and-excitation; 0 for none.
    """

    inputs: int
    outputs: int
    stride: int
    is_first: bool = False
    survival: float = 1.0
    se_reduction: int = 0

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Channels of the input and of the output, and the stride."""
        return self.inputs, self.outputs, self.stride

    @property
    def changes_shape(self) -> bool:
        """Whether the output has other channels or another grid than the input."""
        return self.inputs != self.outputs or self.stride != 1


class ResidualBlock(nn.Module):
    """``after(shortcut(x) + gate(branch(x)))`` with ``x = before(input)``: (B, C, H, W) -> (B, C', H', W').

    Args:
        shape: the block's shape and gates.
        branch: what is learned.
        shortcut: identity or projection; None for a plain network, which has no sum.
        before: what branch and shortcut share; by default nothing.
        after: what follows the sum; by default ReLU.

    Raises:
        ValueError: stochastic depth would drop a block without shortcut, of which nothing but zeros is left.
    """

    def __init__(
        self,
        shape: BlockShape,
        branch: nn.Module,
        shortcut: nn.Module | None,
        *,
        before: nn.Module | None = None,
        after: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if shortcut is None and shape.survival < 1:
            raise ValueError("a plain network takes no drop_path_rate: without shortcuts it would give zeros")
        self.before = nn.Identity() if before is None else before
        self.branch = branch
        reduction = shape.se_reduction
        self.se = SqueezeExcitation(shape.outputs, reduction) if reduction else nn.Identity()
        self.drop_path = StochasticDepth(shape.survival) if shape.survival < 1 else nn.Identity()
        self.shortcut = shortcut
        self.after = nn.ReLU() if after is None else after

    def forward(self, features: Tensor) -> Tensor:
        """Return the output of the block."""
        features = self.before(features)
        output = self.drop_path(self.se(self.branch(features)))
        if self.shortcut is not None:
            output = self.shortcut(features) + output
        result: Tensor = self.after(output)
        return result


def pre_activated_block(
    shape: BlockShape,
    order: str,
    convolutions: Sequence[nn.Conv2d],
    shortcut: nn.Module,
    *,
    shared: bool,
    drop_rate: float = 0.0,
) -> ResidualBlock:
    """Return a block whose branch begins with an activation, and with nothing after the sum.

    Args:
        shape: the block's shape and gates.
        order: see :func:`chain`.
        convolutions: of the branch.
        shortcut: identity or projection.
        shared: the shortcut too reads the activated input; else it reads the raw one.
        drop_rate: of the branch's dropout.
    """
    activation = order[: order.index("c")] if shared else ""
    branch = chain(order.removeprefix(activation), shape.inputs, convolutions, drop_rate)
    before = chain(activation, shape.inputs) if shared else None
    return ResidualBlock(shape, branch, shortcut, before=before, after=nn.Identity())


def block_shapes(
    inputs: int, widths: StageWidths, drop_path_rate: float = 0.0, se_reduction: int = 0
) -> list[list[BlockShape]]:
    """Return the shape of every block of every stage.

    Args:
        inputs: channels of the stem.
        widths: output channels of the blocks.
        drop_path_rate: rate at which stochastic depth drops the last block; it grows linearly.
        se_reduction: see :class:`BlockShape`.
    """
    total, number = sum(map(len, widths)), 0
    shapes: list[list[BlockShape]] = []
    for stage, row in enumerate(widths):
        shapes.append([])
        for index, outputs in enumerate(row):
            number += 1
            stride = 2 if stage > 0 and index == 0 else 1
            survival = linear_survival(number, total, drop_path_rate)
            shapes[-1].append(BlockShape(inputs, outputs, stride, number == 1, survival, se_reduction))
            inputs = outputs
    return shapes


# --- the trunk -------------------------------------------------------------------------------------


class StagedNetwork(PooledNetwork):
    """Stem, stages, what ends the trunk, and the head: (B, C, H, W) -> (B, K).

    Args:
        stem: its first convolution is ``stem.conv1``.
        stages: each a sequence of blocks.
        num_features: channels of the last map.
        last: what follows the last block; by default nothing.
        num_classes: K.
        global_pool: see :meth:`PooledNetwork.add_head`.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        num_features: int,
        *,
        last: nn.Module | None = None,
        num_classes: int = 10,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.last = nn.Identity() if last is None else last
        self.add_head(num_features, num_classes, global_pool, drop_rate)
        initialise(self)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the last map, for images (B, C, H, W)."""
        features: Tensor = self.last(self.stages(self.stem(images)))
        return features

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns of stem and blocks; ``coarse`` has one group a stage."""
        block = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(block, None), (r"^last", (99999,))]}


class ResidualArguments(TypedDict, total=False):
    """Arguments that every residual network hands on; see :func:`build_residual`."""

    num_classes: int
    global_pool: str
    drop_path_rate: float
    se_reduction: int


class CommonArguments(ResidualArguments, total=False):
    """The same, with dropout before the classifier."""

    drop_rate: float


def build_residual(
    stem: nn.Module,
    inputs: int,
    widths: StageWidths,
    make_block: Callable[[BlockShape], ResidualBlock],
    *,
    last: nn.Module | None = None,
    num_classes: int = 10,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    se_reduction: int = 0,
) -> StagedNetwork:
    """Build a residual network.

    Args:
        stem: from images to the first block.
        inputs: channels of the stem's output.
        widths: output channels of the blocks.
        make_block: the family's block of a shape.
        last: what follows the last block; by default nothing.
        num_classes: K.
        global_pool: see :meth:`PooledNetwork.add_head`.
        drop_rate: dropout before the classifier.
        drop_path_rate: see :func:`block_shapes`.
        se_reduction: see :func:`block_shapes`.
    """
    shapes = block_shapes(inputs, widths, drop_path_rate, se_reduction)
    return StagedNetwork(
        stem,
        [nn.Sequential(*map(make_block, stage)) for stage in shapes],
        widths[-1][-1],
        last=last,
        num_classes=num_classes,
        global_pool=global_pool,
        drop_rate=drop_rate,
    )


def initialise(network: PooledNetwork) -> None:
    """Draw the first weights of a network with convolutions, batch norms and a linear head."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if isinstance(network.head.fc, nn.Linear):
        nn.init.zeros_(network.head.fc.bias)


# --- CIFAR -----------------------------------------------------------------------------------------


def cifar_stem(in_chans: int, channels: int, order: str = "cbr") -> nn.Sequential:
    """Return the stem of the CIFAR networks: one 3x3 convolution, by default with batch norm and ReLU."""
    return chain(order, in_chans, [conv(in_chans, channels, 3)])


def cifar_depth(depth: int, layers_per_block: int, others: int) -> int:
    """Return the number n of blocks in each of three stages, with ``depth = 3 n layers_per_block + others``.

    Raises:
        ValueError: no n gives this depth.
    """
    blocks, rest = divmod(depth - others, step := 3 * layers_per_block)
    if rest or blocks < 1:
        raise ValueError(f"depth {depth} is not {step}n + {others}")
    return blocks


def cifar_card(paper: str, num_classes: int = 10) -> PretrainedCfg:
    """Return the card of a network for 3 x 32 x 32 pixels, with the channels' mean and deviation of CIFAR-10.

    Some of the papers subtract the mean of every pixel instead, for which timm's cards have no field.
    """
    return make_card(
        (3, 32, 32),
        paper=paper,
        classifier="head.fc",
        first_conv="stem.conv1",
        num_classes=num_classes,
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
        crop_pct=1.0,
    )
