"""What scales the branch of a residual block before the sum: squeeze-and-excitation, stochastic depth.

Squeeze-and-excitation (arXiv:1709.01507): a factor in (0, 1) for each channel, from the mean of all channels.
As published: two fully connected layers, reduction 16, applied to the branch before the sum.
Decided here: the layers have biases, as in the authors' networks for Caffe; equation 3 has none.

Stochastic depth (arXiv:1603.09382): in training a whole branch is dropped with probability 1 - p, once for a
mini-batch; in evaluation the branch is multiplied by p. The ReLU of the block comes after the sum.
Decided here: a dropped branch is computed and multiplied by 0. The authors' code skips it, which saves a
quarter of the time, but leaves parameters without a gradient in that step; distributed training refuses that,
and the running statistics of a skipped batch normalisation are then of fewer batches.
Where public ports differ: many draw for each image and divide by p in training (timm's ``DropPath``).

Shape legend: B batch, C channels, H W rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SQUEEZE_EXCITATION = "arXiv:1709.01507"


class SqueezeExcitation(nn.Module):
    """Scale each channel by a factor that depends on the means of all: (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C.
        reduction: the inner layer has C // reduction units, at least one; 16 as published.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        inner = max(1, channels // reduction)
        self.fc1 = nn.Linear(channels, inner)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(inner, channels)
        self.sigmoid = nn.Sigmoid()

    def forward(self, features: Tensor) -> Tensor:
        """Return the scaled features."""
        means = features.mean(dim=(2, 3))
        factors: Tensor = self.sigmoid(self.fc2(self.relu(self.fc1(means))))
        return features * factors[:, :, None, None]


class StochasticDepth(nn.Module):
    """Keep or drop a branch for a whole mini-batch: (B, C, H, W) -> (B, C, H, W).

    Args:
        survival: probability p that the branch is kept in training, and its factor in evaluation.
    """

    def __init__(self, survival: float) -> None:
        super().__init__()
        self.survival = survival

    def forward(self, branch: Tensor) -> Tensor:
        """Return the branch times 0 or 1 in training, times p in evaluation."""
        if not self.training:
            return branch * self.survival
        return branch * torch.rand((), device=branch.device).lt(self.survival)

    def extra_repr(self) -> str:
        """Return the probability, for the network's printed form."""
        return f"survival={self.survival:.3f}"


def linear_survival(number: int, total: int, drop_path_rate: float) -> float:
    """Return p of block ``number`` of ``total``, counted from 1: p = 1 - number / total * (1 - p_L).

    Args:
        number: place of the block.
        total: number of residual blocks, L.
        drop_path_rate: 1 - p_L, the rate at which the last block is dropped; 0.5 as published.
    """
    return 1 - number / total * drop_path_rate
