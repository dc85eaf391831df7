"""GoogLeNet as published (Szegedy et al.: Going deeper with convolutions, arXiv:1409.4842).

``googlenet_2014``        With both auxiliary classifiers, 13,378,280 parameters; 6,998,552 without
                          (computed; published: 6.8 million as the sum of Table 1).
``googlenet_2014_naive``  The same with the naive modules of Figure 2a, which have no 1 x 1 reductions and
                          pass on all maps of the pool. For comparison; nobody trained it.

As published: no batch normalisation, a bias and a ReLU in every convolution, 5 x 5 kernels, local response
normalisation after the first pool and before the second, average pooling and dropout 0.4 before the
classifier, auxiliary classifiers on 4a and 4d (5 x 5 average pool of stride 3, 1 x 1 convolution with 128
maps, 1,024 values, dropout 0.7). Their loss counts 0.3 in training, and they are gone after: only training
mode runs them, inside :func:`pretrained.zoo.base.collect_auxiliary_logits`. A saved network keeps their
weights, since the next run trains with them.

Decided here: constants of the normalisation (n = 5, alpha = 1e-4 divided by n, beta = 0.75, k = 1), Glorot's
rule for weights and biases of 0.2, but 0 in the layers of the logits, as in the replication that came with
Caffe, since the paper is silent; pools that round up.

The first row of Table 1 (2.7K parameters, 34M operations) is no 7 x 7 convolution of 3 maps to 64, which
has 9.4K and 118M: it is that of a separable one with 8 maps a channel (3 * 8 * 49 + 24 * 64 = 2,712), which
the paper on batch normalisation (arXiv:1502.03167) says was used. The text and all ports have the dense
one, and so have we.

Public ports differ: torchvision's ``googlenet`` has batch normalisation, no biases, and 3 x 3 kernels
instead of 5 x 5, with 6,624,904 parameters.

Shape legend: B batch, C channels, H W rows and columns, K classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrained.zoo.base import (
    PIXEL_STD,
    AuxiliaryLogits,
    PooledNetwork,
    init_layers,
    make_card,
    make_classifier,
    register,
)

PAPER = "arXiv:1409.4842"
AUXILIARY_WEIGHT, AUXILIARY_WIDTH = 0.3, 1024
"""Weight of an auxiliary classifier's loss, and values that its last layer reads."""


class FilterCounts(NamedTuple):
    """A row of Table 1: filters of every convolution of a module."""

    one: int
    reduce3: int
    three: int
    reduce5: int
    five: int
    pool: int


MODULES = {
    "3a": FilterCounts(64, 96, 128, 16, 32, 32),
    "3b": FilterCounts(128, 128, 192, 32, 96, 64),
    "4a": FilterCounts(192, 96, 208, 16, 48, 64),
    "4b": FilterCounts(160, 112, 224, 24, 64, 64),
    "4c": FilterCounts(128, 128, 256, 24, 64, 64),
    "4d": FilterCounts(112, 144, 288, 32, 64, 64),
    "4e": FilterCounts(256, 160, 320, 32, 128, 128),
    "5a": FilterCounts(256, 160, 320, 32, 128, 128),
    "5b": FilterCounts(384, 192, 384, 48, 128, 128),
}


def make_conv_relu(width: int, filters: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution padded by half its kernel, and a ReLU."""
    layer = nn.Conv2d(width, filters, kernel, stride, padding=kernel // 2)
    return nn.Sequential(layer, nn.ReLU())


class Inception(nn.Module):
    """The module of Figure 2b: four branches side by side, 1 x 1 reductions before 3 x 3 and 5 x 5."""

    def __init__(self, width: int, counts: FilterCounts) -> None:
        super().__init__()
        self.one = make_conv_relu(width, counts.one, 1)
        self.reduce3 = make_conv_relu(width, counts.reduce3, 1)
        self.three = make_conv_relu(counts.reduce3, counts.three, 3)
        self.reduce5 = make_conv_relu(width, counts.reduce5, 1)
        self.five = make_conv_relu(counts.reduce5, counts.five, 5)
        self.pool = nn.MaxPool2d(3, 1, padding=1)
        self.project = make_conv_relu(width, counts.pool, 1)
        self.num_features = counts.one + counts.three + counts.five + counts.pool

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps of the branches in the order 1 x 1, 3 x 3, 5 x 5, pool."""
        three, five = self.three(self.reduce3(x)), self.five(self.reduce5(x))
        return torch.cat([self.one(x), three, five, self.project(self.pool(x))], dim=1)


class NaiveInception(nn.Module):
    """The module of Figure 2a: the branches without reductions, so that all input maps go on too."""

    def __init__(self, width: int, counts: FilterCounts) -> None:
        super().__init__()
        self.one = make_conv_relu(width, counts.one, 1)
        self.three = make_conv_relu(width, counts.three, 3)
        self.five = make_conv_relu(width, counts.five, 5)
        self.pool = nn.MaxPool2d(3, 1, padding=1)
        self.num_features = counts.one + counts.three + counts.five + width

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps of the branches in the order 1 x 1, 3 x 3, 5 x 5, pool."""
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], dim=1)


class AuxiliaryClassifier(nn.Module):
    """A classifier in the middle of the network: (B, C, 14, 14) -> (B, K)."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.conv = make_conv_relu(width, 128, 1)
        self.fc1 = nn.Linear(128 * 4 * 4, AUXILIARY_WIDTH)
        self.drop = nn.Dropout(0.7)
        self.fc2 = make_classifier(AUXILIARY_WIDTH, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits; the pool gives 4 x 4 positions for images of any size."""
        x = F.avg_pool2d(x, 5, 3) if x.shape[2:] == (14, 14) else F.adaptive_avg_pool2d(x, 4)
        x = F.relu(self.fc1(self.conv(x).flatten(1)))
        logits: Tensor = self.fc2(self.drop(x))
        return logits


class GoogLeNet(PooledNetwork):
    """GoogLeNet of 2014: (B, C, 224, 224) -> (B, K).

    Args:
        num_classes: K.
        in_chans: channels of the images.
        drop_rate: probability that a pooled feature is zero in training.
        global_pool: as in :class:`PooledNetwork`.
        auxiliary: have the two auxiliary classifiers.
        naive: have the naive modules.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.4,
        global_pool: str = "avg",
        auxiliary: bool = True,
        naive: bool = False,
    ) -> None:
        super().__init__()
        self.auxiliary_logits: list[AuxiliaryLogits] | None = None
        self.conv1 = make_conv_relu(in_chans, 64, 7, 2)
        self.conv2_reduce = make_conv_relu(64, 64, 1)
        self.conv2 = make_conv_relu(64, 192, 3)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.norm = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)
        width = 192
        kind = NaiveInception if naive else Inception
        for name, counts in MODULES.items():
            module = kind(width, counts)
            self.add_module(f"inception{name}", module)
            width = module.num_features
            if auxiliary and name in ("4a", "4d"):
                self.add_module(f"auxiliary{name}", AuxiliaryClassifier(width, num_classes))
        self.add_head(width, num_classes, global_pool, drop_rate)
        init_layers(self, nn.init.xavier_uniform_, bias=0.2)
        for layer in (self.head.fc, *(classifier.fc2 for classifier in self._auxiliary_classifiers())):
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)

    def _auxiliary_classifiers(self) -> list[AuxiliaryClassifier]:
        return [module for module in self.children() if isinstance(module, AuxiliaryClassifier)]

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the maps of module 5b; the logits of auxiliary classifiers go to whoever collects them."""
        x = self.norm(self.pool(self.conv1(images)))
        x = self.pool(self.norm(self.conv2(self.conv2_reduce(x))))
        for name in MODULES:
            x = self.get_submodule(f"inception{name}")(x)
            auxiliary = getattr(self, f"auxiliary{name}", None)
            if auxiliary is not None and auxiliary.training and self.auxiliary_logits is not None:
                self.auxiliary_logits.append(AuxiliaryLogits(auxiliary(x), AUXILIARY_WEIGHT))
            if name in ("3b", "4e"):
                x = self.pool(x)
        features: Tensor = x
        return features

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the linear layer, and those of the auxiliary classifiers."""
        super().reset_classifier(num_classes, global_pool)
        for classifier in self._auxiliary_classifiers():
            classifier.fc2 = make_classifier(AUXILIARY_WIDTH, num_classes)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return one group a resolution (``coarse``), or one a module with its auxiliary classifier."""
        if coarse:
            return {"stem": r"^conv[12]", "blocks": r"^(?:inception|auxiliary)(\d)"}
        patterns = [rf"^(?:inception|auxiliary){name}\." for name in MODULES]
        return {"stem": r"^conv[12]", "blocks": [(one, (place,)) for place, one in enumerate(patterns)]}


_CARD = make_card((3, 224, 224), paper=PAPER, classifier="head.fc", first_conv="conv1.0", std=PIXEL_STD)

register("googlenet_2014", GoogLeNet, _CARD)
register("googlenet_2014_naive", GoogLeNet, _CARD, naive=True)
