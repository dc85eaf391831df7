"""VGG A-LRN and C (Simonyan, Zisserman: Very deep convolutional networks, arXiv:1409.1556, Table 1).

timm and torchvision have A, B, D and E (``vgg11``, ``vgg13``, ``vgg16``, ``vgg19``). The two that are
missing:

``vgg11_lrn``  A with local response normalisation after the first convolution; it has no parameters, so there
               are 132,863,336 (computed; published: 133 million).
``vgg16_c``    D with a 1 x 1 convolution as the last of the third, fourth and fifth block. 133,638,952
               parameters (computed; published: 134 million).

As published: 3 x 3 kernels with padding 1, ReLU after each, 2 x 2 pools, two layers of 4,096 with dropout
0.5, AlexNet's constants in the normalisation, images less the mean colour.

Decided here: the weights of A-LRN are drawn with the deviation 0.01, as are AlexNet's. The paper says "zero
mean and 10^-2 variance", a deviation of 0.1: with that the first logits are of the size of 1e7, so it is read
as a slip. Those of C are drawn by the rule of Glorot and Bengio: the paper began C with layers of a trained
A, and says that this rule makes that unnecessary. Images of other sizes are pooled to 7 x 7 before fc6. The
paper's dense evaluation, with fc6 as a convolution, is not here.

Public ports: we know of none that has C; Caffe's "VGG-16" is D.

Shape legend: B batch, C channels, H W rows and columns, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pretrained.zoo.alexnet import make_lrn
from pretrained.zoo.base import PIXEL_STD, ZooNetwork, init_layers, make_card, make_classifier, register

BLOCKS_A = ((3,), (3,), (3, 3), (3, 3), (3, 3))
BLOCKS_C = ((3, 3), (3, 3), (3, 3, 1), (3, 3, 1), (3, 3, 1))
"""Kernel sizes of the convolutions of each block."""
WIDTHS = (64, 128, 256, 512, 512)
GRID, HIDDEN = 7, 4096


class VGGVariant(ZooNetwork):
    """A network of Table 1: (B, C, 224, 224) -> (B, K).

    Args:
        num_classes: K.
        in_chans: channels of the images.
        drop_rate: probability that a value of fc6 or fc7 is zero in training.
        global_pool: ``avg``, timm's default, for none: fc6 reads the whole map.
        blocks: kernel sizes of the convolutions of each of the five blocks.
        with_lrn: normalise after the first convolution.
        std: deviation of the weights at first; None for the rule of Glorot and Bengio.

    Raises:
        ValueError: another pooling is asked for.
    """

    classifier_name = "fc8"

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.5,
        global_pool: str = "avg",
        blocks: Sequence[Sequence[int]] = BLOCKS_A,
        with_lrn: bool = False,
        std: float | None = None,
    ) -> None:
        super().__init__()
        self._set_global_pool(global_pool)
        self.num_classes, self.num_features, self.head_hidden_size = num_classes, WIDTHS[-1], HIDDEN
        width = in_chans
        for number, (kernels, filters) in enumerate(zip(blocks, WIDTHS, strict=True), start=1):
            self.add_module(f"block{number}", _make_block(width, filters, kernels, with_lrn and number == 1))
            width = filters
        self.fc6 = nn.Linear(width * GRID**2, HIDDEN)
        self.fc7 = nn.Linear(HIDDEN, HIDDEN)
        self.relu, self.drop = nn.ReLU(), nn.Dropout(drop_rate)
        self.fc8 = make_classifier(HIDDEN, num_classes)
        init_layers(self, partial(nn.init.normal_, std=std) if std else nn.init.xavier_normal_)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the maps of the last pool, (B, 512, 7, 7) at the published size."""
        x = images
        for number in range(1, len(WIDTHS) + 1):
            x = self.get_submodule(f"block{number}")(x)
        return x

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, K), or with ``pre_logits`` the values of fc7 (B, 4096)."""
        x = F.adaptive_avg_pool2d(features, GRID).flatten(1)
        x = self.drop(self.relu(self.fc6(x)))
        x = self.drop(self.relu(self.fc7(x)))
        output: Tensor = x if pre_logits else self.fc8(x)
        return output

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return one group a block; fc6 and fc7 stay between these and the head."""
        return {"stem": r"^block1\.", "blocks": r"^block(\d)\."}


def _make_block(width: int, filters: int, kernels: Sequence[int], with_lrn: bool) -> nn.Sequential:
    block = nn.Sequential()
    for number, kernel in enumerate(kernels, start=1):
        block.add_module(f"conv{number}", nn.Conv2d(width, filters, kernel, padding=kernel // 2))
        block.add_module(f"relu{number}", nn.ReLU())
        width = filters
    if with_lrn:
        block.add_module("norm", make_lrn())
    block.add_module("pool", nn.MaxPool2d(2))
    return block


_CARD = make_card(
    (3, 224, 224), paper="arXiv:1409.1556", classifier="fc8", first_conv="block1.conv1", std=PIXEL_STD
)

register("vgg11_lrn", VGGVariant, _CARD, blocks=BLOCKS_A, with_lrn=True, std=0.01)
register("vgg16_c", VGGVariant, _CARD, blocks=BLOCKS_C)
