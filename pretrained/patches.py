"""Refuse image sizes that the patches of a network do not divide, or that its forward does not take."""

from __future__ import annotations

import timm
import torch
from torch import nn

from finetune.errors import UsageError
from pretrained.catalog import Card
from pretrained.network import refuse_size, timm_name


def check_patches(network: nn.Module, card: Card) -> None:
    """Check that the patches of a network divide its images, and that it takes images of this size.

    The size that a network was published with is always allowed.

    Raises:
        UsageError: they do not, and the message names the two nearest sizes; or its forward fails.
    """
    size, patch, published = card.preprocessing.size, _find_patch_size(network), _published_size(card)
    if size == published:
        return
    if patch and any(side % patch for side in size):
        raise refuse_size(card, patch)
    if published is not None:
        _try_forward(network, card, published)


def _try_forward(network: nn.Module, card: Card, published: tuple[int, int]) -> None:
    """Run one image through a network: tensors without content would not show an index out of range."""
    if any(parameter.is_meta for parameter in network.parameters()):
        return
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            network(torch.zeros(1, *card.preprocessing.input_size))
    except (RuntimeError, LookupError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        found = f"its forward fails on images of this size: {type(error).__name__} {reason}".strip()
        fix = (
            f"Leave --img-size out (it was published at {published[0]}x{published[1]}), or take another size."
        )
        raise UsageError(
            f"backbone {card.name} at {card.preprocessing.size_name} pixels", found, fix
        ) from None
    finally:
        for module, training in modes.items():
            module.training = training


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


def _published_size(card: Card) -> tuple[int, int] | None:
    if card.library != "timm":
        return None
    config = timm.get_pretrained_cfg(timm_name(card))
    return config.input_size[1:] if config is not None else None
