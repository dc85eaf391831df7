"""AlphaGo's policy network (Silver et al.: Mastering the game of Go, Nature 529, 2016, Methods).

``alphago_policy`` has the 192 filters of the match version, 3,882,793 parameters (computed; not published);
``alphago_policy_128``, ``_256`` and ``_384`` are those of Extended Data Table 3.

As published: a board of 19 x 19 points with 48 planes of features; 5 x 5 kernels on the board padded by two,
eleven layers of 3 x 3 padded by one, a ReLU after each; one 1 x 1 filter "with a different bias for each
position", then a softmax over the 361 points. Here the logits of the points, in the order of rows, are the
classes. There is no pass and no normalisation, and the planes are zeros and ones.

Decided here: weights by He's rule (arXiv:1502.01852), as the paper is silent; for the 1 x 1 filter a
deviation of 0.01, with which all moves are about equally likely at first. A classifier for anything but 361
points is pooling and one linear layer.

Public ports that differ have a pass, a plain bias, or batch normalisation (which is AlphaGo Zero's).

Shape legend: B batch, C planes, H W rows and columns of the board, K classes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pretrained.zoo.base import ZooNetwork, init_layers, make_card, make_classifier, make_pool, register

BOARD, PLANES, LAYERS = 19, 48, 12
POINTS = BOARD**2


class MoveHead(nn.Module):
    """One 1 x 1 filter and a bias for each point: (B, C, 19, 19) -> (B, 361)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 1, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(POINTS))

    def forward(self, features: Tensor) -> Tensor:
        """Return the logit of every point, in the order of rows."""
        logits: Tensor = self.conv(features).flatten(1) + self.bias
        return logits


class PolicyNetwork(ZooNetwork):
    """The policy network: (B, 48, 19, 19) -> (B, 361).

    Args:
        num_classes: K; 361 has one output a point, another number pools and has a linear layer.
        in_chans: planes of the board.
        drop_rate: probability that a pooled feature is zero in training, for other than 361 classes.
        global_pool: as in :class:`PooledNetwork`, for other than 361 classes.
        width: filters of every layer.
    """

    classifier_name = "head"

    def __init__(
        self,
        num_classes: int = POINTS,
        in_chans: int = PLANES,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        width: int = 192,
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        for number in range(1, LAYERS + 1):
            kernel = 5 if number == 1 else 3
            layer = nn.Conv2d(in_chans if number == 1 else width, width, kernel, padding=kernel // 2)
            self.layers.add_module(f"conv{number}", layer)
            self.layers.add_module(f"relu{number}", nn.ReLU())
        self.num_classes, self.num_features = num_classes, width
        self._set_global_pool(global_pool)
        self.drop = nn.Dropout(drop_rate)
        self.head = (
            MoveHead(width) if num_classes == POINTS else make_classifier(self.head_hidden_size, num_classes)
        )
        init_layers(self.layers, partial(nn.init.kaiming_normal_, nonlinearity="relu"))
        init_layers(self.head, partial(nn.init.normal_, std=0.01))

    def _set_global_pool(self, global_pool: str) -> None:
        self.pool = make_pool(global_pool)
        self.head_hidden_size = self.num_features * self.pool.feat_mult()

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the maps of the twelfth layer, as large as the board."""
        features: Tensor = self.layers(images)
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, K), or with ``pre_logits`` the pooled features (B, D)."""
        if pre_logits or not isinstance(self.head, MoveHead):
            features = self.drop(self.pool(features))
        output: Tensor = features if pre_logits else self.head(features)
        return output

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return one group a layer."""
        return {"stem": r"^layers\.conv1\.", "blocks": r"^layers\.conv(\d+)\."}


_CARD = make_card(
    (PLANES, BOARD, BOARD),
    paper="doi:10.1038/nature16961",
    classifier="head",
    first_conv="layers.conv1",
    num_classes=POINTS,
    mean=(0.0,) * PLANES,
    std=(1.0,) * PLANES,
    crop_pct=1.0,
)

register("alphago_policy", PolicyNetwork, _CARD)
for _width in (128, 256, 384):
    register(f"alphago_policy_{_width}", PolicyNetwork, _CARD, width=_width)
