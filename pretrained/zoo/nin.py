"""Network in Network (Lin, Chen, Yan, arXiv:1312.4400).

An "mlpconv" is a convolution followed by two 1 x 1 convolutions, each with a ReLU: a small network that
slides over the image. There are no fully connected layers; the last 1 x 1 convolution has one map a class,
and the logits are the averages of these maps.

``nin_cifar``     Three mlpconvs, 966,986 parameters (computed; published: "0.97M" in later papers).
``nin_imagenet``  Four mlpconvs, 7,595,176 parameters (computed; published: a file of 29 MB).

As published: the structure, global average pooling, dropout between mlpconvs, images of 32 pixels whitened.

Decided here: the paper gives no widths, so these are of the authors' own files for Caffe: dropout 0.5 after
both pools (CIFAR), before the last mlpconv (ImageNet); pools of 3 with stride 2 that round up, the second
one of CIFAR an average; a ReLU also after the maps of the classes; weights of deviation 0.05, on ImageNet of
0.01 in the first convolution of the first and third mlpconv and in the classifier; biases of 0. Their CIFAR
images are whitened (ZCA) and theirs of ImageNet have 224 pixels less the mean; here CIFAR images are
normalised by channel. A classifier for other classes is pooling and one linear layer, without the ReLU, with
which half of new logits would have no gradient.

Public ports differ: pytorchcv pads the pools of the CIFAR net by one, which shifts their windows by a pixel.

Shape legend: B batch, C channels, H W rows and columns, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from pretrained.zoo.base import (
    CIFAR_MEAN,
    CIFAR_STD,
    PIXEL_STD,
    ZooNetwork,
    init_layers,
    make_card,
    make_classifier,
    make_pool,
    register,
)

PAPER = "arXiv:1312.4400"
STD = 0.05
"""Deviation of the first weights of most layers."""


class Mlpconv(NamedTuple):
    """A convolution and its 1 x 1 convolutions; ``before``, in order: ``max``, ``avg``, ``drop``.

    ``std`` is the deviation of the convolution's weights at first; those of the 1 x 1 ones have ``STD``.
    """

    kernel: int
    widths: tuple[int, ...]
    stride: int = 1
    padding: int = 0
    before: tuple[str, ...] = ()
    std: float = STD


CIFAR = (
    Mlpconv(5, (192, 160, 96), padding=2),
    Mlpconv(5, (192, 192, 192), padding=2, before=("max", "drop")),
    Mlpconv(3, (192, 192), padding=1, before=("avg", "drop")),
)
IMAGENET = (
    Mlpconv(11, (96, 96, 96), stride=4, std=0.01),
    Mlpconv(5, (256, 256, 256), padding=2, before=("max",)),
    Mlpconv(3, (384, 384, 384), padding=1, before=("max",), std=0.01),
    Mlpconv(3, (1024, 1024), padding=1, before=("max", "drop")),
)
"""The last mlpconv of each lacks its last layer, which is the classifier."""


class NetworkInNetwork(ZooNetwork):
    """Network in Network: (B, C, H, W) -> (B, K).

    Args:
        num_classes: K.
        in_chans: channels of the images.
        drop_rate: probability that a value is zero in training, between mlpconvs.
        global_pool: as in :class:`PooledNetwork`; ``catavgmax``, which would pool every class map to two
            values, has the linear layer of other classes.
        blocks: the mlpconvs, without the classifier.
        classifier_std: deviation of the classifier's weights at first.
    """

    classifier_name = "classifier"

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.5,
        global_pool: str = "avg",
        blocks: Sequence[Mlpconv] = CIFAR,
        classifier_std: float = STD,
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential()
        width = in_chans
        for number, block in enumerate(blocks, start=1):
            self.blocks.add_module(f"mlpconv{number}", _make_block(block, width, drop_rate))
            width = block.widths[-1]
        self.num_classes, self.num_features = num_classes, width
        self._set_global_pool(global_pool)
        keeps_width = self.head_hidden_size == width
        self.classifier: nn.Module = (
            nn.Conv2d(width, num_classes, 1)
            if num_classes and keeps_width
            else make_classifier(self.head_hidden_size, num_classes)
        )
        self.relu = nn.ReLU()
        init_layers(self.blocks, partial(nn.init.normal_, std=STD))
        for number, block in enumerate(blocks, start=1):
            nn.init.normal_(self.blocks.get_parameter(f"mlpconv{number}.conv1.weight"), std=block.std)
        init_layers(self.classifier, partial(nn.init.normal_, std=classifier_std))

    def _set_global_pool(self, global_pool: str) -> None:
        self.pool = make_pool(global_pool)
        self.head_hidden_size = self.num_features * self.pool.feat_mult()

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the last maps before those of the classes."""
        features: Tensor = self.blocks(images)
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, K), or with ``pre_logits`` the pooled features (B, D)."""
        if not pre_logits and isinstance(self.classifier, nn.Conv2d):
            logits: Tensor = self.pool(self.relu(self.classifier(features)))
            return logits
        pooled: Tensor = self.pool(features)
        return pooled if pre_logits else self.classifier(pooled)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return one group an mlpconv."""
        return {"stem": r"^blocks\.mlpconv1\.", "blocks": r"^blocks\.mlpconv(\d)\."}


def _make_block(block: Mlpconv, width: int, drop_rate: float) -> nn.Sequential:
    before = {
        "max": nn.MaxPool2d(3, 2, ceil_mode=True),
        "avg": nn.AvgPool2d(3, 2, ceil_mode=True),
        "drop": nn.Dropout(drop_rate),
    }
    modules = nn.Sequential()
    for name in block.before:
        modules.add_module(name, before[name])
    for number, filters in enumerate(block.widths, start=1):
        first = nn.Conv2d(width, filters, block.kernel, block.stride, block.padding)
        modules.add_module(f"conv{number}", first if number == 1 else nn.Conv2d(width, filters, 1))
        modules.add_module(f"relu{number}", nn.ReLU())
        width = filters
    return modules


_make_card = partial(make_card, paper=PAPER, classifier="classifier", first_conv="blocks.mlpconv1.conv1")

_CIFAR_CARD = _make_card((3, 32, 32), num_classes=10, mean=CIFAR_MEAN, std=CIFAR_STD, crop_pct=1.0)
_IMAGENET_CARD = _make_card((3, 224, 224), std=PIXEL_STD)

register("nin_cifar", NetworkInNetwork, _CIFAR_CARD, blocks=CIFAR)
register("nin_imagenet", NetworkInNetwork, _IMAGENET_CARD, blocks=IMAGENET, classifier_std=0.01)
