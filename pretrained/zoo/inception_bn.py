"""BN-Inception, or Inception v2 (Ioffe, Szegedy: Batch normalization, arXiv:1502.03167, Figure 5).

``bn_inception``: 11,188,288 parameters (computed; the text says 13.6 million, which the widths of Figure 5
do not add up to).

As published: two 3 x 3 convolutions instead of a 5 x 5; a third module at 28 x 28; average and maximum
pools as in Figure 5; no pools between modules, but modules 3c and 4e have stride 2 and pass their pool on;
batch normalisation before every ReLU, so that convolutions need no bias (section 3.2); a separable first
convolution with 8 maps a channel; no local response normalisation, no dropout.

Decided here: 96 maps behind the pools of 4c and 4d. Figure 5 prints "avg + 128" there beside outputs of 576,
which do not add up: 96 gives 576, as TensorFlow's ``inception_v2`` has it, and 128 gives 608. Pools that
round up, average pools that count their padding; He's rule for weights (arXiv:1502.01852). The auxiliary
classifiers that the paper keeps silent about are left out.

Public ports differ: those with weights from Caffe (pytorchcv, pretrainedmodels) have a dense first
convolution, biases before the normalisation, and the other reading of 4c and 4d, with 128 maps and outputs of
608; "Inception v2" of arXiv:1512.00567, Table 1, is another network.

Shape legend: B batch, C channels, H W rows and columns, K classes.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pretrained.zoo.base import PooledNetwork, init_layers, make_card, register

MULTIPLIER = 8
"""Maps that the first convolution makes of each channel of the image."""


class BNFilterCounts(NamedTuple):
    """A row of Figure 5. Without 1 x 1 filters a module has stride 2 and passes its maximum pool on."""

    one: int
    reduce3: int
    three: int
    reduce_double: int
    double: int
    pool: str
    project: int


MODULES = {
    "3a": BNFilterCounts(64, 64, 64, 64, 96, "avg", 32),
    "3b": BNFilterCounts(64, 64, 96, 64, 96, "avg", 64),
    "3c": BNFilterCounts(0, 128, 160, 64, 96, "max", 0),
    "4a": BNFilterCounts(224, 64, 96, 96, 128, "avg", 128),
    "4b": BNFilterCounts(192, 96, 128, 96, 128, "avg", 128),
    "4c": BNFilterCounts(160, 128, 160, 128, 160, "avg", 96),
    "4d": BNFilterCounts(96, 128, 192, 160, 192, "avg", 96),
    "4e": BNFilterCounts(0, 128, 192, 192, 256, "max", 0),
    "5a": BNFilterCounts(352, 192, 320, 160, 224, "avg", 128),
    "5b": BNFilterCounts(352, 192, 320, 192, 224, "max", 128),
}


def make_conv_bn_relu(width: int, filters: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution without bias, batch normalisation and a ReLU."""
    layer = nn.Conv2d(width, filters, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(filters), nn.ReLU())


class BNInceptionModule(nn.Module):
    """A module of Figure 5: (B, C, H, W) -> (B, C', H, W), or half of H and W for one with stride 2."""

    def __init__(self, width: int, counts: BNFilterCounts) -> None:
        super().__init__()
        stride = 1 if counts.one else 2
        self.branches = nn.ModuleDict()
        if counts.one:
            self.branches["single1"] = make_conv_bn_relu(width, counts.one, 1)
        self.branches["single3"] = nn.Sequential(
            make_conv_bn_relu(width, counts.reduce3, 1),
            make_conv_bn_relu(counts.reduce3, counts.three, 3, stride),
        )
        self.branches["double3"] = nn.Sequential(
            make_conv_bn_relu(width, counts.reduce_double, 1),
            make_conv_bn_relu(counts.reduce_double, counts.double, 3),
            make_conv_bn_relu(counts.double, counts.double, 3, stride),
        )
        padding = 1 if counts.one else 0  # with stride 2 the pool rounds up instead
        pool: nn.Module = nn.MaxPool2d(3, stride, padding, ceil_mode=True)
        if counts.pool == "avg":
            pool = nn.AvgPool2d(3, stride, padding)
        pooled = self.branches["pooled"] = nn.Sequential(pool)
        if counts.project:
            pooled.append(make_conv_bn_relu(width, counts.project, 1))
        self.num_features = counts.one + counts.three + counts.double + (counts.project or width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps of the branches in the order 1 x 1, 3 x 3, double 3 x 3, pool."""
        return torch.cat([branch(x) for branch in self.branches.values()], dim=1)


class BNInception(PooledNetwork):
    """Inception with batch normalisation: (B, C, 224, 224) -> (B, K).

    Args:
        num_classes: K.
        in_chans: channels of the images.
        drop_rate: probability that a pooled feature is zero in training; the paper removed dropout.
        global_pool: as in :class:`PooledNetwork`.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        maps = in_chans * MULTIPLIER
        depthwise = nn.Conv2d(in_chans, maps, 7, 2, padding=3, groups=in_chans, bias=False)
        self.conv1 = nn.Sequential(depthwise, *make_conv_bn_relu(maps, 64, 1))
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2 = nn.Sequential(make_conv_bn_relu(64, 64, 1), make_conv_bn_relu(64, 192, 3))
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        width = 192
        for name, counts in MODULES.items():
            module = BNInceptionModule(width, counts)
            self.add_module(f"inception{name}", module)
            width = module.num_features
        self.add_head(width, num_classes, global_pool, drop_rate)
        init_layers(self, partial(nn.init.kaiming_normal_, nonlinearity="relu"))
        init_layers(self.head.fc, partial(nn.init.normal_, std=0.01))

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the maps of module 5b, (B, 1024, 7, 7) at the published size."""
        x: Tensor = self.pool2(self.conv2(self.pool1(self.conv1(images))))
        for name in MODULES:
            x = self.get_submodule(f"inception{name}")(x)
        return x

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return one group a resolution (``coarse``), or one a module."""
        if coarse:
            return {"stem": r"^conv[12]", "blocks": r"^inception(\d)"}
        patterns = [rf"^inception{name}\." for name in MODULES]
        return {"stem": r"^conv[12]", "blocks": [(one, (place,)) for place, one in enumerate(patterns)]}


register(
    "bn_inception",
    BNInception,
    make_card((3, 224, 224), paper="arXiv:1502.03167", classifier="head.fc", first_conv="conv1.0"),
)
