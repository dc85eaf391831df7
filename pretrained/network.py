"""Build a network from its card, with random weights and the card's classifier."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import timm
import torch
import torchvision.models as tv
from torch import nn

from finetune.errors import UsageError
from pretrained.catalog import Card, HeadChoice
from pretrained.first_convolution import change_channels
from pretrained.graph.recorder import FeaturePoint
from pretrained.heads import change_head
from pretrained.stage_classifier import build_stage_classifier

_NOT_FOR_CONFIGS = {"pretrained", "checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay"}
"""Arguments of timm's factory that download or read weights; an untrusted config.json must not set them."""
_SMALLEST_SIZE = 16
"""Smallest image size of a recipe."""


def build_network(card: Card, dropout: float | None = None) -> nn.Module:
    """Return the card's network with random weights, in float32, with ``card.num_classes`` outputs.

    Args:
        card: the network; the card of an exported run also describes its changed head.
        dropout: dropout rate of a timm classifier, instead of the card's.

    Raises:
        UsageError: the network does not support ``card.preprocessing.img_size``.
    """
    if card.taps:
        return _build_stage_classifier(card)
    if card.library == "torchvision":
        network, dropout = _build_torchvision(card), card.dropout
    else:
        if dropout is None and card.head != "keep":
            dropout = card.dropout
        network = _build_timm(card, dropout)
    if card.head != "keep":
        change_head(network, card.num_classes, card.head, dropout or 0.0)
    return network


def _build_stage_classifier(card: Card) -> nn.Module:
    """The classifier of the network itself is never executed, so it has one class only."""
    head: HeadChoice = "replace" if card.head == "keep" else card.head
    network = build_network(replace(card, taps=(), num_classes=1, head=head))
    points = [FeaturePoint(*tap) for tap in card.taps]
    return build_stage_classifier(network, points, card.pool, card.num_classes, card.preprocessing.input_size)


def build_outline(card: Card, dropout: float | None = None) -> nn.Module:
    """Return the card's network on the meta device, without memory for its weights, if possible."""
    try:
        with torch.device("meta"):
            return build_network(card, dropout)
    except (
        RuntimeError,
        NotImplementedError,
    ):  # torchvision's RegNet computes in its constructor
        return build_network(card, dropout)


def with_published_dropout(card: Card) -> Card:
    """Return the card of a published network with its dropout rate; any other card as it is.

    The card of a run has the rate that the run trained with. The published rate is that of the layers which
    the argument ``drop_rate`` sets: GoogLeNet's auxiliary classifiers have a rate of their own. In FractalNet
    it grows to the published one.
    """
    if card.source != "zoo" or card.head != "keep":
        return card
    published, without = (_list_dropout(build_outline(card, dropout)) for dropout in (None, 0.0))
    rates = (rate for rate, other in zip(published, without, strict=True) if rate != other)
    return replace(card, dropout=max(rates, default=0.0))


def _list_dropout(network: nn.Module) -> list[float]:
    return [layer.p for layer in network.modules() if isinstance(layer, nn.Dropout)]


def timm_name(card: Card) -> str:
    """Return the name in timm; timm does not know the tags of folders and of other hub repositories."""
    return card.name.removeprefix("timm/") if card.name.startswith("timm/") else card.architecture


def timm_arguments(card: Card) -> dict[str, Any]:
    """Return the arguments of ``timm.create_model`` besides the name."""
    given = {key: value for key, value in card.model_args if key not in _NOT_FOR_CONFIGS}
    kwargs: dict[str, Any] = given | {"num_classes": card.num_classes}
    config = timm.get_pretrained_cfg(timm_name(card))
    other_size = config.fixed_input_size and card.preprocessing.input_size != config.input_size
    if other_size or "img_size" in kwargs:
        kwargs["img_size"] = card.preprocessing.img_size
    if card.preprocessing.kind == "bands":
        kwargs["in_chans"] = card.preprocessing.channels
    return kwargs


def _build_timm(card: Card, dropout: float | None) -> nn.Module:
    kwargs = timm_arguments(card) | ({} if dropout is None else {"drop_rate": dropout})
    try:
        network: nn.Module = timm.create_model(timm_name(card), **kwargs)
    except TypeError as error:  # encoders have no argument drop_rate
        found = f"timm cannot build it with a classifier: {error}"
        raise UsageError(
            f"backbone {card.name}", found, "Take another one (see `finetune backbones`)."
        ) from None
    except Exception as error:  # arguments of an untrusted config.json may raise anything
        raise _cannot_build(card, error) from None
    return network


def _cannot_build(card: Card, error: Exception) -> UsageError:
    found = " ".join(str(error).split())[:200]
    if not found or isinstance(error, LookupError | ArithmeticError | AttributeError):
        found = f"{type(error).__name__} {found}".strip()
    return UsageError(
        f"backbone {card.name} at {card.preprocessing.size_name} pixels",
        f"{card.library} cannot build it: {found}",
        "Leave --img-size out, or take a multiple of the network's patch size.",
    )


def refuse_size(card: Card, patch: int) -> UsageError:
    """Return the refusal of an image size that the patches of a network do not divide."""
    view = card.preprocessing
    seen = [side // patch * patch for side in view.size]
    unseen = 100 * (1 - math.prod(seen) / math.prod(view.size))
    found = (
        f"its patches of {patch} pixels do not divide {view.size_name} pixels: {unseen:.0f} % of the area, "
        "at the right and lower edges, would not be seen"
    )
    near = [
        replace(view, img_size=(height, width)).size_name
        for height, width in (seen, [-(-side // patch) * patch for side in view.size])
        if min(height, width) >= _SMALLEST_SIZE
    ]
    return UsageError(
        f"backbone {card.name} at {view.size_name} pixels", found, f"Take --img-size {' or '.join(near)}."
    )


def _build_torchvision(card: Card) -> nn.Module:
    kwargs: dict[str, Any] = {"num_classes": card.num_classes if card.head == "keep" else 1000}
    if card.architecture in ("googlenet", "inception_v3"):
        # Auxiliary heads are for training from scratch only; init_weights is slow (SciPy).
        is_rgb = card.preprocessing.is_rgb
        kwargs |= {"aux_logits": False, "init_weights": False, "transform_input": is_rgb}
    if card.architecture.startswith("vit_"):
        kwargs["image_size"] = height = _require_square(card)
        patch = int(card.architecture.rpartition("_")[2])
        if height % patch:
            raise refuse_size(card, patch)
    try:
        network: nn.Module = tv.get_model(card.architecture, weights=None, **kwargs)
        if card.preprocessing.kind == "bands":
            change_channels(network, card.preprocessing.channels)
    except (AssertionError, ValueError, ArithmeticError) as error:  # build_outline handles RuntimeError
        raise _cannot_build(card, error) from None
    return network


def _require_square(card: Card) -> int:
    height, width = card.preprocessing.size
    if height != width:
        found = "torchvision's vision transformers take squares only"
        asked = f"backbone {card.name} at {card.preprocessing.size_name} pixels"
        raise UsageError(asked, found, f"Take --img-size {height}, or a vision transformer of timm.")
    return height


def is_convolutional(network: nn.Module) -> bool:
    """Return whether most weights are those of convolutions: such networks are faster in channels-last."""
    total = sum(parameter.numel() for parameter in network.parameters())
    layers = (layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    return 2 * sum(layer.weight.numel() for layer in layers) > total
