"""The general pattern of convolutional networks, [(CONV-RELU)*N-POOL?]*M-(FC-RELU)*K, as a builder.

The pattern is that of the lectures, not of a paper: N convolutions with ReLU and perhaps a pool, M times;
then K fully connected layers with ReLU; then the layer of the logits (the softmax is in the loss). "N is
usually up to 5, M is large, 0 <= K <= 2." AlexNet, ZFNet and VGG are of this form, ResNet and GoogLeNet are
not.

``conv_pattern`` has N = 2, M = 3, K = 1 for images of 32 pixels, 550,570 parameters (computed). All numbers
are arguments: ``timm.create_model("conv_pattern", num_convolutions=1, num_blocks=4, num_hidden=2)``.

Decided here: kernels of 3 x 3 padded by one, 2 x 2 pools, maps that double with each block, weights by He's
rule (arXiv:1502.01852). Without hidden layers the last map is flattened too. The layers after the
convolutions need the size of the images (``img_size``).

Shape legend: B batch, C channels, H W rows and columns, K classes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers import to_2tuple
from torch import Tensor, nn

from pretrained.zoo.base import (
    CIFAR_MEAN,
    CIFAR_STD,
    ZooNetwork,
    init_layers,
    make_card,
    make_classifier,
    register,
)


class ConvPattern(ZooNetwork):
    """A network of the pattern: (B, C, H, W) -> (B, K).

    Args:
        num_classes: K of the shape legend.
        in_chans: channels of the images.
        drop_rate: probability that a hidden value is zero in training.
        global_pool: ``avg``, timm's default, for none: the layers behind the last map read all of it.
        img_size: rows and columns of the images in pixels, one number if they are as many.
        num_convolutions: N of the pattern, convolutions in each block.
        with_pool: end each block with a pool, which halves the rows and columns.
        num_blocks: M of the pattern.
        num_hidden: K of the pattern, fully connected layers before that of the logits.
        width: maps of the first block; the next ones have twice, four times as many.
        hidden_width: values of each fully connected layer.

    Raises:
        ValueError: N or M is below 1, the images are too small for M pools, or another pooling is asked for.
    """

    classifier_name = "classifier"

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 32,
        num_convolutions: int = 2,
        with_pool: bool = True,
        num_blocks: int = 3,
        num_hidden: int = 1,
        width: int = 32,
        hidden_width: int = 128,
    ) -> None:
        super().__init__()
        self._set_global_pool(global_pool)
        rows, columns = (size >> num_blocks * with_pool for size in to_2tuple(img_size))
        if min(num_convolutions, num_blocks, rows, columns) < 1:
            fault = f"N = {num_convolutions}, M = {num_blocks} at {img_size} pixels"
            raise ValueError(f"{fault}: N and M are at least 1, and M pools leave at least one pixel")
        self.blocks, self.hidden = nn.Sequential(), nn.Sequential()
        maps = in_chans
        for number in range(num_blocks):
            self.blocks.append(_make_block(maps, width << number, num_convolutions, with_pool))
            maps = width << number
        self.num_features, features = maps, maps * rows * columns
        for _ in range(num_hidden):
            self.hidden.append(_make_hidden(features, hidden_width, drop_rate))
            features = hidden_width
        self.num_classes, self.head_hidden_size = num_classes, features
        self.classifier = make_classifier(features, num_classes)
        init_layers(self, partial(nn.init.kaiming_normal_, nonlinearity="relu"))
        init_layers(self.classifier, partial(nn.init.normal_, std=0.01))

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the maps of the last block."""
        features: Tensor = self.blocks(images)
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, K), or with ``pre_logits`` what their layer reads."""
        x = self.hidden(features.flatten(1))
        output: Tensor = x if pre_logits else self.classifier(x)
        return output

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return one group a block; the hidden layers stay between these and the head."""
        return {"stem": r"^blocks\.0\.", "blocks": r"^blocks\.(\d+)\."}


def _make_block(maps: int, width: int, num_convolutions: int, with_pool: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number in range(num_convolutions):
        layers += [nn.Conv2d(width if number else maps, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, *[nn.MaxPool2d(2)] * with_pool)


def _make_hidden(features: int, width: int, drop_rate: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Dropout(drop_rate))


register(
    "conv_pattern",
    ConvPattern,
    make_card(
        (3, 32, 32),
        paper="",
        classifier="classifier",
        first_conv="blocks.0.0",
        num_classes=10,
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
        crop_pct=1.0,
        fixed_input_size=True,
    ),
)
