"""LeNet-5 (LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document recognition, 1998).

``lenet5``        The form that everybody means today: C3 reads all six maps, subsampling is an average
                  without parameters, the output is a linear layer. 61,706 parameters (computed).
``lenet5_paper``  As printed: C3 reads the maps of Table I, S2 and S4 have a gain and a bias a map and a
                  squashing function, the output is a distance to fixed codes. 60,000 trainable parameters
                  (published: "LeNet-5 contains 340,908 connections, but only 60,000 trainable free
                  parameters").

As published in both: 32 x 32 pixels, one channel, 5 x 5 kernels, the squashing function 1.7159 tanh(2x /
3), weights uniform in +-2.4 / fan-in, and values of -0.1 (background) and 1.175 (ink).

Decided here: biases begin at zero. The codes of the output are drawn at random with a fixed seed, which the
paper names as a possibility; it used pictures of the characters, which exist for characters only. The logits
are the negative distances, so that the cross-entropy is the paper's criterion (9) without its constant j.
Images of other sizes are averaged over the positions of C5.

Public ports differ: most have ReLU and max pooling, C5 as a layer on 400 values of a 28-pixel image padded by
two, or a C3 of their own (28-pixel images without padding give 44,426 parameters).

Shape legend: B batch, C channels, H W rows and columns, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrained.zoo.base import ZooNetwork, make_card, make_classifier, register, to_grey

PAPER = "LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document recognition (1998)"
TABLE_1 = (
    *((0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5)),
    *((0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5)),
    *((0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5)),
    (0, 1, 2, 3, 4, 5),
)
"""The maps of S2 that each of the 16 maps of C3 reads: 60 connections instead of 96."""
CODE_SEED = 1998


class Squash(nn.Module):
    """The paper's squashing function, 1.7159 tanh(2x / 3): about 1 at 1 and -1 at -1."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the same shape."""
        return 1.7159 * torch.tanh(2 / 3 * x)


class Subsampling(nn.Module):
    """The sum of 2 x 2 values times a gain, plus a bias: (B, C, H, W) -> (B, C, H / 2, W / 2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        _init_uniform(self.gain, fan_in=4)

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps at half the resolution, before the squashing function."""
        return 4 * F.avg_pool2d(x, 2) * self.gain[:, None, None] + self.bias[:, None, None]


class PartialConvolution(nn.Module):
    """C3 of the paper: each output map reads some input maps only: (B, 6, H, W) -> (B, 16, H - 4, W - 4).

    Only the kernels of existing connections are parameters: ``weight`` is (60, 5, 5).
    """

    places: Tensor

    def __init__(self) -> None:
        super().__init__()
        connections = [(output, read) for output, maps in enumerate(TABLE_1) for read in maps]
        self.weight = nn.Parameter(torch.empty(len(connections), 5, 5))
        self.bias = nn.Parameter(torch.zeros(len(TABLE_1)))
        places = torch.full((len(TABLE_1), 6), len(connections), device="cpu")  # the last kernel is zero
        for place, connection in enumerate(connections):
            places[connection] = place
        self.register_buffer("places", places.to(self.weight.device), persistent=False)
        start = 0
        for maps in TABLE_1:  # the fan-in is that of a unit
            _init_uniform(self.weight[start : start + len(maps)], fan_in=25 * len(maps))
            start += len(maps)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with a kernel (16, 6, 5, 5) that is zero where there is no connection."""
        kernels = F.pad(self.weight, (0, 0, 0, 0, 0, 1))
        return F.conv2d(x, kernels[self.places], self.bias)


class CodeDistance(nn.Linear):
    """Negative squared distances to fixed codes of -1 and 1: (B, 84) -> (B, K); nothing in it learns.

    It is a linear layer for the rest of the program, and up to the length of the features, which is the same
    for all classes, it is one: -|x - w|^2 = 2 wx - |w|^2 - |x|^2.
    """

    def __init__(self, num_features: int, num_classes: int) -> None:
        nn.Module.__init__(self)  # its weight is no parameter
        self.in_features, self.out_features = num_features, num_classes
        generator = torch.Generator().manual_seed(CODE_SEED)
        signs = torch.randint(0, 2, (num_classes, num_features), generator=generator, device="cpu")
        codes = (2 * signs - 1).to(torch.get_default_dtype())
        self.register_buffer("weight", codes.to(torch.empty(0).device))
        self.register_parameter("bias", None)

    def forward(self, input: Tensor) -> Tensor:
        """Return logits (B, K), none above zero."""
        return -(input[:, None, :] - self.weight).square().sum(dim=-1)


class LeNet5(ZooNetwork):
    """LeNet-5: (B, C, 32, 32) -> (B, K).

    Args:
        num_classes: K.
        in_chans: channels of the images; one makes colour images grey.
        drop_rate: probability that one of the 84 features is zero in training; the paper has no dropout.
        global_pool: ``avg``, the only one.
        as_printed: partial connections, trainable subsampling, and distances to codes as the output.

    Raises:
        ValueError: another pooling is asked for.
    """

    classifier_name = "output"

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        as_printed: bool = False,
    ) -> None:
        super().__init__()
        self._set_global_pool(global_pool)
        self.num_classes, self.num_features, self.head_hidden_size = num_classes, 120, 84
        self.squash = Squash()
        self.c1 = nn.Conv2d(in_chans, 6, 5)
        self.s2 = nn.Sequential(Subsampling(6), Squash()) if as_printed else nn.AvgPool2d(2)
        self.c3 = PartialConvolution() if as_printed else nn.Conv2d(6, 16, 5)
        self.s4 = nn.Sequential(Subsampling(16), Squash()) if as_printed else nn.AvgPool2d(2)
        self.c5 = nn.Conv2d(16, 120, 5)
        self.f6 = nn.Linear(120, 84)
        self.drop = nn.Dropout(drop_rate)
        has_codes = as_printed and num_classes
        self.output = CodeDistance(84, num_classes) if has_codes else make_classifier(84, num_classes)
        for layer in (self.c1, self.c3, self.c5, self.f6, self.output):
            if isinstance(layer, nn.Conv2d | nn.Linear) and not isinstance(layer, CodeDistance):
                _init_uniform(layer.weight, fan_in=layer.weight[0].numel())
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the maps of C5, (B, 120, 1, 1) for 32 pixels."""
        if self.c1.in_channels == 1:
            images = to_grey(images)
        x = self.s2(self.squash(self.c1(images)))
        x = self.s4(self.squash(self.c3(x)))
        features: Tensor = self.squash(self.c5(x))
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, K), or with ``pre_logits`` the 84 values of F6."""
        hidden: Tensor = self.drop(self.squash(self.f6(features.mean((2, 3)))))
        return hidden if pre_logits else self.output(hidden)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return one group a convolution, with the subsampling behind it."""
        return {"stem": r"^[cs][12]\.", "blocks": [(r"^[cs][34]\.", (1,)), (r"^c5\.", (2,))]}


def _init_uniform(weight: Tensor, fan_in: int) -> None:
    nn.init.uniform_(weight.data, -2.4 / fan_in, 2.4 / fan_in)


_CARD = make_card(
    (1, 32, 32),
    paper=PAPER,
    classifier="output",
    first_conv="c1",
    num_classes=10,
    mean=(0.1 / 1.275,),  # 0 becomes -0.1 and 1 becomes 1.175, section II.A
    std=(1 / 1.275,),
    crop_pct=1.0,
)

register("lenet5", LeNet5, _CARD)
register("lenet5_paper", LeNet5, _CARD, as_printed=True)
