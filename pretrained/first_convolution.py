"""Adapt a first convolution with 1 or 4 input channels to the 3 channels of an image, as timm does."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

NUM_CHANNELS = 3
_ADAPTABLE = (1, 4)
"""Grey images, and RGB with a fourth channel. With others, the channels are not those of a photograph."""


def adapt_first_convolution(
    network: nn.Module, state: Mapping[str, Tensor]
) -> tuple[Mapping[str, Tensor], str]:
    """Return a state dict whose first convolution has 3 input channels, and a sentence on what was done.

    It is the inverse of ``timm.models.adapt_input_conv``: the channels are repeated or cut to three, and
    scaled by the old number of channels over three. One channel is divided among red, green and blue, so
    that a grey image gives the same features; of four channels the first three are kept.

    Args:
        network: the network that the state dict is for.
        state: a state dict; it is returned unchanged, with ``""``, if nothing is to do or can be done.
    """
    for name, layer in network.named_modules():
        if not isinstance(layer, nn.Conv2d) or layer.in_channels != NUM_CHANNELS or layer.groups != 1:
            continue
        key = f"{name}.weight"
        weight = state.get(key)
        if weight is None or weight.ndim != 4 or weight.shape[1] not in _ADAPTABLE:
            continue
        wanted = tuple(layer.weight.shape)
        if (weight.shape[0], *weight.shape[2:]) != (wanted[0], *wanted[2:]):
            continue
        channels = weight.shape[1]
        repeated = weight.float().repeat(1, math.ceil(NUM_CHANNELS / channels), 1, 1)[:, :NUM_CHANNELS]
        adapted = (repeated * (channels / NUM_CHANNELS)).to(weight.dtype)
        how = "its channel is divided among three" if channels == 1 else "its first three channels are kept"
        shapes = f"{tuple(weight.shape)} in the file and {wanted} in the network"
        return {**state, key: adapted}, f"the first convolution {key} is {shapes}: {how}, as timm does"
    return state, ""
