"""Refuse image sizes that the patches of a network do not divide: the margin would never be seen."""

from __future__ import annotations

import timm
from torch import nn

from pretrained.catalog import Card
from pretrained.network import refuse_size, timm_name


def check_patches(network: nn.Module, card: Card) -> None:
    """Check that the patches of a network divide its images.

    The size that a network was published with is always allowed.

    Raises:
        UsageError: they do not; the message names the two nearest sizes.
    """
    size, patch = card.preprocessing.img_size, _find_patch_size(network)
    if not patch or size % patch == 0 or size == _published_size(card):
        return
    raise refuse_size(card, patch)


def _find_patch_size(network: nn.Module) -> int:
    """Return the side of the patches that the first convolution cuts an image into; 0 if it cuts none."""
    for module in network.modules():
        if getattr(module, "dynamic_img_pad", False):  # it pads the images itself
            return 0
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            kernel, step = int(module.kernel_size[0]), int(module.stride[0])
            cuts = kernel % step == 0 and not any(module.padding)  # PiT's patches overlap by half
            return step if cuts and step > 1 else 0
    return 0


def _published_size(card: Card) -> int | None:
    if card.library != "timm":
        return None
    config = timm.get_pretrained_cfg(timm_name(card))
    return int(config.input_size[-1]) if config is not None else None
