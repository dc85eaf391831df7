"""From what a layer gives to one row of numbers an image.

=========  ==========================================================  =================================
pool       of a map (B, C, H, W) or tokens (B, L, D)                   numbers an image
=========  ==========================================================  =================================
``auto``   the class token where the classifier reads one, else avg    C or D
``token``  the class token                                             D
``avg``    mean over positions, class and register tokens left out     C or D
``max``    maximum over the same positions                             C or D
``avgmax`` mean of avg and max, as timm means it                       C or D
``grid2``  means of four quarters, channel by channel                  4 C or 4 D
``flatten`` every number, class token included                         C x H x W or L x D
=========  ==========================================================  =================================

A plain vector (B, D) stays as it is, whatever the pool.

Shape legend: B batch, C channels, H W positions, L tokens, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor
from torch.nn import functional as F

from finetune.errors import UsageError, suggest

Pool = Literal["auto", "token", "avg", "max", "avgmax", "grid2", "flatten"]
POOLS: tuple[Pool, ...] = get_args(Pool)
LaunchSpec = Literal["vector", "channels_first", "channels_last", "tokens"]
TRUE_TO_FORM = 1.5
"""Sides that are farther than this from the image's proportions, as a factor, are no height and width."""


@dataclass(frozen=True)
class Form:
    """How the axes of a layer's tensor are to be read.

    Attributes:
        order: ``vector`` (B, D), ``channels_first`` (B, C, H, W), ``channels_last`` (B, H, W, C) or
            ``tokens`` (B, L, D); windows that are folded into the batch axis count as tokens.
        prefix: class and register tokens that come before those of the image.
        size: (H, W) of the positions; None where they are no rectangle.
        width: C or D.
    """

    order: LaunchSpec
    prefix: int
    size: tuple[int, int] | None
    width: int

    @property
    def num_positions(self) -> int:
        """Of the image itself; 1 for a vector."""
        return math.prod(self.size) if self.size else 1

    def num_features(self, pool: Pool) -> int:
        """Return how many numbers an image gets."""
        if pool == "flatten":
            return self.width * (self.num_positions + self.prefix)
        return 4 * self.width if pool == "grid2" and self.order != "vector" else self.width


def find_form(shape: tuple[int, ...], input_size: tuple[int, int, int], num_prefix: int) -> Form | None:
    """Read the axes of a tensor.

    Args:
        shape: for one image: the first axis holds its windows, and is 1 where there are none.
        input_size: (C, H, W) of the images.
        num_prefix: class and register tokens that the network puts before the image's.

    Returns:
        None for a tensor that cannot be told apart by image.
    """
    if len(shape) < 2:
        return None
    if len(shape) == 2:
        return Form("vector", 0, None, shape[1]) if shape[0] == 1 else _tokens(shape, input_size, 0)
    if len(shape) == 4 and shape[0] == 1:
        first, last = (skew(pair, input_size) for pair in (shape[1:3], shape[2:4]))
        if last <= min(first, TRUE_TO_FORM):
            return Form("channels_first", 0, (shape[2], shape[3]), shape[1])
        return Form("channels_last", 0, (shape[1], shape[2]), shape[3])
    return _tokens(shape, input_size, num_prefix)


def _tokens(shape: tuple[int, ...], input_size: tuple[int, int, int], num_prefix: int) -> Form:
    length, width = math.prod(shape[:-1]), shape[-1]
    for prefix in (num_prefix, 0, 1):  # networks that do not tell may still have a class token
        size = _rectangle(length - prefix, input_size)
        if size is not None:
            return Form("tokens", prefix, size, width)
    return Form("tokens", 0, (1, length), width)


def _rectangle(length: int, input_size: tuple[int, int, int]) -> tuple[int, int] | None:
    """The rectangle of so many positions with the image's proportions."""
    height = round(math.sqrt(max(length, 0) * input_size[1] / input_size[2]))
    if height and length % height == 0 and skew((height, length // height), input_size) <= TRUE_TO_FORM:
        return height, length // height
    return None


def skew(pair: tuple[int, ...], input_size: tuple[int, int, int]) -> float:
    """Return how far the sides of ``pair`` are from the image's proportions, as a factor of at least 1."""
    ratio = (pair[0] * input_size[2]) / max(pair[1] * input_size[1], 1)
    return max(ratio, 1 / ratio) if ratio else math.inf


def check_pool(name: str, form: Form, pool: Pool) -> None:
    """Refuse a pool that a layer has nothing for.

    Raises:
        UsageError: no class token, or positions that have no quarters.
    """
    if pool == "token" and not form.prefix and form.order != "vector":
        found = "the layer has no class token"
        raise UsageError(f"--pool token of layer {name}", found, "Take --pool avg.")
    if pool == "grid2" and form.order != "vector" and min(form.size or (1, 1)) < 2:
        found = f"its {form.num_positions} positions have no quarters"
        raise UsageError(f"--pool grid2 of layer {name}", found, "Take --pool avg or flatten.")


def pool_tensor(tensor: Tensor, form: Form, pool: Pool, num_images: int) -> Tensor:
    """Return rows (B, D) float32 that share no memory with the tensor.

    Args:
        tensor: of a layer; (B, ...), or with windows folded into the first axis.
        form: how to read it.
        pool: ``auto`` takes the class token of a tensor that has one.
        num_images: B.
    """
    tensor = tensor.float()
    if form.order == "vector":
        return tensor.reshape(num_images, -1).clone()
    if pool == "flatten":
        return tensor.reshape(num_images, -1).clone()
    grid = _to_positions(tensor, form, num_images)
    if form.prefix and pool in ("auto", "token"):
        return grid[:, :, 0].clone()
    return _pool(grid[:, :, form.prefix :], form, pool)


def _to_positions(tensor: Tensor, form: Form, num_images: int) -> Tensor:
    """(B, C, L) of any order."""
    if form.order == "channels_first":
        return tensor.flatten(2)
    return tensor.reshape(num_images, -1, form.width).transpose(1, 2)


def _pool(positions: Tensor, form: Form, pool: Pool) -> Tensor:
    if pool == "max":
        return positions.amax(dim=2)
    if pool == "avgmax":
        return (positions.mean(dim=2) + positions.amax(dim=2)) / 2
    if pool == "grid2":
        assert form.size is not None
        grid = positions.reshape(*positions.shape[:2], *form.size)
        return F.adaptive_avg_pool2d(grid, 2).flatten(1)
    return positions.mean(dim=2)


def read_pool(word: str) -> Pool:
    """Return the pool of a name.

    Raises:
        UsageError: there is none.
    """
    for pool in POOLS:
        if pool == word:
            return pool
    found = f"there is no such pool{suggest(word, POOLS)}"
    raise UsageError(f"--pool {word}", found, f"Take {', '.join(POOLS)}.")
