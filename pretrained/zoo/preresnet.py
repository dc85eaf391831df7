"""Pre-activation ResNets for CIFAR: "Identity Mappings in Deep Residual Networks", arXiv:1603.05027.

The five units of its figure 4 and table 2 differ in where batch norm and ReLU are:

    original     conv BN ReLU conv BN | sum | ReLU
    bn_after     conv BN ReLU conv    | sum | BN ReLU
    relu_before  conv BN ReLU conv BN ReLU | sum
    relu_only    ReLU conv BN ReLU conv BN | sum
    full         BN ReLU conv BN ReLU conv | sum         full pre-activation, what the paper proposes

As published: the first unit's activation is right after the first convolution, before the paths divide; an
extra activation follows the last sum. Where the shape changes, the shortcut too reads the activated signal.
Depth 164 and 1001 have bottlenecks of 16, 32, 64 channels (64, 128, 256 behind them) with the stride in the
first 1x1 and a 1x1 convolution as shortcut, as in the authors' code (resnet-1k-layers); depth 110 has basic
units and option A.

Where the paper is silent: the extra activations of ``relu_only`` are a ReLU; the projection of a bottleneck
has batch norm where the last convolution of the unit has it.
Where public ports differ: no activation after the last sum; shortcuts on the raw signal where the shape
changes; pytorchcv has the stride in the 3x3 and projections in depth 110, whose first unit adds the raw
signal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, Unpack

from torch import nn

from pretrained.zoo.base import register
from pretrained.zoo.gates import SQUEEZE_EXCITATION
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
    pre_activated_block,
    projection,
    two_convs,
)

PAPER = "arXiv:1603.05027"
UnitName: TypeAlias = Literal["original", "bn_after", "relu_before", "relu_only", "full"]


@dataclass(frozen=True)
class UnitForm:
    """Orders of layers, in the letters of :func:`chain`.

    Attributes:
        around: layers before and after each of all convolutions but the last, as ``(before, after)``.
        end: layers after the last convolution, before the sum.
        after: layers after the sum.
        stem: of the network.
        last: layers after the last unit.
    """

    around: tuple[str, str]
    end: str
    after: str
    stem: str
    last: str

    def branch(self, convolutions: int) -> str:
        """Return the order of a branch with so many convolutions."""
        before, after = self.around
        return f"{before}c{after}" * (convolutions - 1) + f"{before}c{self.end}"


FORMS: dict[UnitName, UnitForm] = {
    "original": UnitForm(("", "br"), "b", "r", "cbr", ""),
    "bn_after": UnitForm(("", "br"), "", "br", "cbr", ""),
    "relu_before": UnitForm(("", "br"), "br", "", "cbr", ""),
    "relu_only": UnitForm(("r", "b"), "b", "", "cb", "r"),
    "full": UnitForm(("br", ""), "", "", "c", "br"),
}


def preresnet_block(shape: BlockShape, unit: UnitName, *, bottleneck: bool) -> ResidualBlock:
    """Return a unit of one of the five forms."""
    form = FORMS[unit]
    convolutions, shortcut = _parts(shape, form, bottleneck=bottleneck)
    order = form.branch(len(convolutions))
    if form.around[0]:
        shared = shape.is_first or shape.changes_shape
        return pre_activated_block(shape, order, convolutions, shortcut, shared=shared)
    after = chain(form.after, shape.outputs)
    return ResidualBlock(shape, chain(order, shape.inputs, convolutions), shortcut, after=after)


def _parts(shape: BlockShape, form: UnitForm, *, bottleneck: bool) -> tuple[list[nn.Conv2d], nn.Module]:
    """Return the convolutions of the branch, and the shortcut."""
    convolutions = (
        bottleneck_convs(*shape.sizes, inner=shape.outputs // 4, stride_first=True)
        if bottleneck
        else two_convs(*shape.sizes)
    )
    if not shape.changes_shape:
        return convolutions, nn.Identity()
    if not bottleneck:
        return convolutions, PadShortcut(*shape.sizes)
    return convolutions, projection(*shape.sizes, order="cb" if form.end.startswith("b") else "c")


def cifar_preresnet(
    depth: int,
    unit: UnitName = "full",
    *,
    bottleneck: bool = True,
    in_chans: int = 3,
    **common: Unpack[CommonArguments],
) -> StagedNetwork:
    """Build a network of one of the five units.

    Args:
        depth: 9n + 2 with bottlenecks (164, 1001), else 6n + 2 (110).
        unit: place of batch norm and ReLU.
        bottleneck: units of 1x1, 3x3, 1x1 convolutions.
        in_chans: channels of an image.
        **common: see :func:`build_residual`.

    Raises:
        ValueError: the depth is not of that form.
    """
    blocks = cifar_depth(depth, 3 if bottleneck else 2, 2)
    widths = [[channels * (4 if bottleneck else 1)] * blocks for channels in (16, 32, 64)]
    form = FORMS[unit]
    return build_residual(
        cifar_stem(in_chans, 16, form.stem),
        16,
        widths,
        lambda shape: preresnet_block(shape, unit, bottleneck=bottleneck),
        last=chain(form.last, widths[-1][-1]),
        **common,
    )


def _register_all() -> None:
    units: tuple[UnitName, ...] = ("original", "bn_after", "relu_before", "relu_only")
    card, se_card = cifar_card(PAPER), cifar_card(SQUEEZE_EXCITATION)
    register("cifar_preresnet1001", cifar_preresnet, card, depth=1001)
    for depth in (110, 164):
        name, form = f"preresnet{depth}", {"depth": depth, "bottleneck": depth == 164}
        register(f"cifar_{name}", cifar_preresnet, card, **form)
        register(f"cifar_se_{name}", cifar_preresnet, se_card, **form, se_reduction=16)
        for unit in units:
            register(f"cifar_{name}_{unit}", cifar_preresnet, card, **form, unit=unit)


_register_all()
