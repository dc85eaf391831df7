"""Adapt a first convolution to another number of input channels, as timm does."""

from __future__ import annotations

from collections.abc import Mapping

from timm.models import adapt_input_conv
from torch import Tensor, nn

NUM_CHANNELS = 3
_ADAPTABLE = (1, NUM_CHANNELS, 4)
"""Grey images, RGB, and RGB with a fourth channel. Others are not the channels of a photograph."""


def adapt_first_convolution(
    network: nn.Module, state: Mapping[str, Tensor]
) -> tuple[Mapping[str, Tensor], str]:
    """Return a state dict whose first convolution has the network's input channels, and what was done to it.

    Channels are repeated or cut to the number that is wanted, and scaled by the old number over the new one:
    if all channels of an image are the same, the features are too. Three channels that become one are summed.

    Every convolution of the image is adapted (RepVGG has two).

    Args:
        network: the network that the state dict is for.
        state: a state dict; it is returned unchanged, with ``""``, if nothing is to do or can be done.
    """
    adapted: dict[str, Tensor] = {}
    said = ""
    for name, layer in network.named_modules():
        key = f"{name}.weight"
        weight = state.get(key)
        if not isinstance(layer, nn.Conv2d) or layer.groups != 1 or weight is None or weight.ndim != 4:
            continue
        found, wanted = weight.shape[1], layer.in_channels
        fits_else = (weight.shape[0], *weight.shape[2:]) == (layer.out_channels, *layer.kernel_size)
        if found == wanted or not fits_else or found not in _ADAPTABLE or NUM_CHANNELS not in (found, wanted):
            continue
        adapted[key] = adapt_input_conv(wanted, weight, found)
        shapes = f"{tuple(weight.shape)} in the file and {tuple(layer.weight.shape)} in the network"
        said = said or f"the first convolution {key} is {shapes}: {_describe(found, wanted)}, as timm does"
    return {**state, **adapted}, said


def _describe(found: int, wanted: int) -> str:
    if wanted == 1:
        return "its channels are summed"
    if found == 1:
        return "its channel is divided among three"
    if wanted < found:
        return "its first three channels are kept"
    return f"its channels are repeated to {wanted}"


def change_channels(network: nn.Module, channels: int) -> None:
    """Replace the first convolution of a network of RGB by one with random weights for other channels.

    Raises:
        ValueError: its first convolution has not three input channels.
    """
    layers = ((name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d))
    name, layer = next(layers, ("", None))
    if layer is None or layer.in_channels != NUM_CHANNELS or layer.groups != 1:
        raise ValueError("its first layer is no convolution of three channels")
    parent, _, own = name.rpartition(".")
    other = nn.Conv2d(
        channels,
        layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        layer.dilation,  # type: ignore[arg-type]
        bias=layer.bias is not None,
    )
    setattr(network.get_submodule(parent), own, other)
