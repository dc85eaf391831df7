"""AlexNet (Krizhevsky, Sutskever, Hinton: ImageNet classification with deep convolutional networks, 2012).

As published: kernels of 11, 5, 3, 3, 3 with 96, 256, 384, 384, 256 filters; the second, fourth and fifth
convolution see the maps of their own half only (two GPUs: ``groups=2``); local response normalisation (k = 2,
n = 5, alpha = 1e-4, beta = 0.75) after the ReLU of the first two; overlapping 3 x 3 pools of stride 2 after
these and the fifth; two layers of 4,096 with dropout 0.5; weights of deviation 0.01, biases of 1 in
convolutions 2, 4, 5 and in fc6 and fc7. 60,965,224 parameters (computed; published: "60 million").

Decided here: 227 pixels, since the printed 224 do not give 55 x 55 positions without padding; they are cut of
images whose short side is 256, as the paper's are. Images of other sizes are pooled to 6 x 6 before fc6.

Public ports differ: torchvision's ``alexnet`` is the net of "One weird trick" (arXiv:1404.5997): 64 and 192
filters, no groups, no normalisation, 61,100,840 parameters. pytorchcv's has no groups. ``LocalResponseNorm``
of torch divides alpha by n, the paper does not: a port that gives it 1e-4 normalises a fifth as much.

``alexnet_2012_without_7`` and so on lack layers, as in the ablation of Zeiler and Fergus (arXiv:1311.2901,
Table 3).

Shape legend: B batch, C channels, H W rows and columns, K classes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from pretrained.zoo.base import PIXEL_STD, ZooNetwork, init_layers, make_card, make_classifier, register

PAPER = "Krizhevsky, Sutskever, Hinton: ImageNet classification with deep convolutional networks (2012)"
ABLATIONS = ((7,), (6, 7), (3, 4), (3, 4, 6, 7))
"""What the ablation removes: numbers of layers."""
WIDTH, GRID = 4096, 6
"""Values of fc6 and fc7; rows and columns of the map that fc6 reads."""


def make_lrn() -> nn.LocalResponseNorm:
    """Return the paper's normalisation: a / (2 + 1e-4 * sum of squares of 5 neighbouring maps) ** 0.75."""
    return nn.LocalResponseNorm(size=5, alpha=5 * 1e-4, beta=0.75, k=2.0)  # torch divides alpha by the size


class Convolution(NamedTuple):
    """One convolution and what follows its ReLU, in order: ``norm``, ``pool``."""

    filters: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    after: tuple[str, ...] = ()


class EightLayerNetwork(ZooNetwork):
    """Five convolutions with what is between them, then fc6, fc7 and fc8: (B, C, H, W) -> (B, K).

    Args:
        convolutions: layers 1 to 5.
        num_classes: K.
        in_chans: channels of the images.
        drop_rate: probability that a value of fc6 or fc7 is zero in training.
        global_pool: ``avg``, timm's default, for none: fc6 reads the whole map.
        remove: numbers of the layers that are left out, among 3, 4, 6 and 7.

    Raises:
        ValueError: another layer is to be removed, or another pooling is asked for.
    """

    classifier_name = "fc8"

    def __init__(
        self,
        convolutions: Sequence[Convolution],
        num_classes: int,
        in_chans: int,
        drop_rate: float,
        global_pool: str,
        remove: Collection[int],
    ) -> None:
        super().__init__()
        if wrong := set(remove) - {3, 4, 6, 7}:
            raise ValueError(f"layers 3, 4, 6 and 7 can be removed, not {sorted(wrong)}")
        self._set_global_pool(global_pool)
        self.num_classes, self.num_features = num_classes, in_chans
        for number, convolution in enumerate(convolutions, start=1):
            if number not in remove:
                self._add_convolution(number, convolution)
        self.feature_layers = [name for name, _ in self.named_children()]
        self.head_hidden_size = self.num_features * GRID**2
        for number in (6, 7):
            if number not in remove:
                self._add_hidden(number, drop_rate)
        self.hidden_layers = [name for name, _ in self.named_children()][len(self.feature_layers) :]
        self.fc8 = make_classifier(self.head_hidden_size, num_classes)
        init_layers(self, partial(nn.init.normal_, std=0.01))

    def _add_convolution(self, number: int, convolution: Convolution) -> None:
        filters, kernel, stride, padding, groups, after = convolution
        layer = nn.Conv2d(self.num_features, filters, kernel, stride, padding, groups=groups)
        self.add_module(f"conv{number}", layer)
        self.add_module(f"relu{number}", nn.ReLU())
        for name in after:
            following = make_lrn() if name == "norm" else nn.MaxPool2d(3, 2, ceil_mode=True)
            self.add_module(f"{name}{number}", following)
        self.num_features = filters

    def _add_hidden(self, number: int, drop_rate: float) -> None:
        self.add_module(f"fc{number}", nn.Linear(self.head_hidden_size, WIDTH))
        self.add_module(f"relu{number}", nn.ReLU())
        self.add_module(f"drop{number}", nn.Dropout(drop_rate))
        self.head_hidden_size = WIDTH

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the maps of pool5, (B, 256, 6, 6) at the published size."""
        return self._run(self.feature_layers, images)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, K), or with ``pre_logits`` the last hidden layer (B, 4096)."""
        x = self._run(self.hidden_layers, F.adaptive_avg_pool2d(features, GRID).flatten(1))
        output: Tensor = x if pre_logits else self.fc8(x)
        return output

    def _run(self, names: Sequence[str], x: Tensor) -> Tensor:
        for name in names:
            x = self.get_submodule(name)(x)
        return x

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return one group a convolution; fc6 and fc7 stay between these and the head."""
        return {"stem": r"^conv1\.", "blocks": r"^conv(\d)\."}


CONVOLUTIONS = (
    Convolution(96, 11, stride=4, after=("norm", "pool")),
    Convolution(256, 5, padding=2, groups=2, after=("norm", "pool")),
    Convolution(384, 3, padding=1),
    Convolution(384, 3, padding=1, groups=2),
    Convolution(256, 3, padding=1, groups=2, after=("pool",)),
)
BIASED = ("conv2", "conv4", "conv5", "fc6", "fc7")
"""Layers whose biases are 1 at first."""


class AlexNet(EightLayerNetwork):
    """AlexNet of 2012: (B, C, 227, 227) -> (B, K).

    Args:
        num_classes: K.
        in_chans: channels of the images.
        drop_rate: probability that a value of fc6 or fc7 is zero in training.
        global_pool: see :class:`EightLayerNetwork`.
        remove: numbers of the layers that are left out, among 3, 4, 6 and 7.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.5,
        global_pool: str = "avg",
        remove: Collection[int] = (),
    ) -> None:
        super().__init__(CONVOLUTIONS, num_classes, in_chans, drop_rate, global_pool, remove)
        for name, layer in self.named_children():
            if name in BIASED:
                nn.init.ones_(layer.bias)  # type: ignore[arg-type]  # torch types attributes as modules too


_CARD = make_card(
    (3, 227, 227), paper=PAPER, classifier="fc8", first_conv="conv1", std=PIXEL_STD, crop_pct=227 / 256
)

register("alexnet_2012", AlexNet, _CARD)
for _remove in ABLATIONS:
    register(f"alexnet_2012_without_{''.join(map(str, _remove))}", AlexNet, _CARD, remove=_remove)
