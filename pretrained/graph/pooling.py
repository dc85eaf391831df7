"""Pool the tensor of a layer into one row of features per image.

=========  ==========================================================  =================================
pool       of a map (B, C, H, W) or tokens (B, L, D)                   features per image
=========  ==========================================================  =================================
``auto``   the class token if the classifier reads one, else avg       C or D
``token``  the class token                                             D
``avg``    mean over positions, without class and register tokens      C or D
``max``    maximum over the same positions                             C or D
``avgmax`` mean of avg and max, as in timm                             C or D
``grid2``  means of the four quadrants                                 4 C or 4 D
``flatten`` all elements, including the class token                    C x H x W or L x D
=========  ==========================================================  =================================

A vector (B, D) is not changed by any pool.

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
AxisOrder = Literal["vector", "channels_first", "channels_last", "tokens"]
MAX_SKEW = 1.5
"""Two axes whose ratio differs from the image's by more than this factor are not height and width."""


@dataclass(frozen=True)
class Form:
    """The meaning of the axes of a layer's tensor.

    Attributes:
        order: ``vector`` (B, D), ``channels_first`` (B, C, H, W), ``channels_last`` (B, H, W, C) or
            ``tokens`` (B, L, D); windows that are folded into the batch axis count as tokens.
        prefix: number of class and register tokens before the tokens of the image.
        size: (H, W) of the positions; None for a vector.
        width: C or D.
    """

    order: AxisOrder
    prefix: int
    size: tuple[int, int] | None
    width: int

    @property
    def num_positions(self) -> int:
        """Number of positions of the image; 1 for a vector."""
        return math.prod(self.size) if self.size else 1

    def num_features(self, pool: Pool) -> int:
        """Return the number of features per image."""
        if pool == "flatten":
            return self.width * (self.num_positions + self.prefix)
        return 4 * self.width if pool == "grid2" and self.order != "vector" else self.width


def find_form(shape: tuple[int, ...], input_size: tuple[int, int, int], num_prefix: int) -> Form | None:
    """Find the meaning of the axes of a tensor.

    Args:
        shape: for one image; the first axis holds its windows, and is 1 without windows.
        input_size: (C, H, W) of the images.
        num_prefix: number of class and register tokens before the image's.

    Returns:
        The form; None for a tensor with fewer than two axes.
    """
    if len(shape) < 2:
        return None
    if len(shape) == 2:
        return Form("vector", 0, None, shape[1]) if shape[0] == 1 else _tokens(shape, input_size, 0)
    if len(shape) == 4 and shape[0] == 1:
        first, last = (skew(pair, input_size) for pair in (shape[1:3], shape[2:4]))
        if last <= min(first, MAX_SKEW):
            return Form("channels_first", 0, (shape[2], shape[3]), shape[1])
        return Form("channels_last", 0, (shape[1], shape[2]), shape[3])
    return _tokens(shape, input_size, num_prefix)


def _tokens(shape: tuple[int, ...], input_size: tuple[int, int, int], num_prefix: int) -> Form:
    length, width = math.prod(shape[:-1]), shape[-1]
    for prefix in (num_prefix, 0, 1):  # a network without num_prefix_tokens may still have a class token
        size = _rectangle(length - prefix, input_size)
        if size is not None:
            return Form("tokens", prefix, size, width)
    return Form("tokens", 0, (1, length), width)


def _rectangle(length: int, input_size: tuple[int, int, int]) -> tuple[int, int] | None:
    """The (H, W) with this product that is close to the image's aspect ratio, else None."""
    height = round(math.sqrt(max(length, 0) * input_size[1] / input_size[2]))
    if height and length % height == 0 and skew((height, length // height), input_size) <= MAX_SKEW:
        return height, length // height
    return None


def skew(pair: tuple[int, ...], input_size: tuple[int, int, int]) -> float:
    """Return the factor, at least 1, between the aspect ratios of ``pair`` and of the image."""
    ratio = (pair[0] * input_size[2]) / max(pair[1] * input_size[1], 1)
    return max(ratio, 1 / ratio) if ratio else math.inf


def check_pool(name: str, form: Form, pool: Pool) -> None:
    """Refuse a pool that does not fit a layer.

    Raises:
        UsageError: the layer has no class token, or fewer than 2 x 2 positions.
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
        tensor: tensor of a layer, (B, ...), or with windows folded into the first axis.
        form: meaning of its axes.
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


def to_map(tensor: Tensor, form: Form) -> Tensor:
    """Return the features of a layer in any order of axes as a map (B, C, h, w), without class tokens.

    Args:
        tensor: (B, ...), without windows in the first axis.
        form: meaning of its axes; it has positions. Maps may have another size than the form says.
    """
    if form.order == "channels_first":
        return tensor
    if form.order == "channels_last":
        return tensor.movedim(3, 1)
    assert form.size is not None
    rows = tensor.reshape(len(tensor), -1, form.width)[:, form.prefix :]
    return rows.mT.reshape(len(tensor), form.width, *form.size)


def _to_positions(tensor: Tensor, form: Form, num_images: int) -> Tensor:
    """Return (B, C, L) for any order of axes."""
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
