"""Name the networks that share all tensors of another one, but expect other pixels.

``tf_efficientnet_lite0`` and ``efficientnet_lite0`` have the same names and shapes, and different means. No
check of tensors can tell whose weights a file holds; its name or metadata may. So it is with other weights of
one architecture: ``vit_small_patch16_224.dino`` expects other pixels than its default weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from finetune.errors import UsageError
from pretrained.catalog import Card, find_card
from pretrained.network import build_outline
from pretrained.sizes import num_parameters, parameter_counts

_MAX_TWINS = 12
_FOLDERS = 5
"""Last parts of a path that may name a network: ``models--timm--NAME/snapshots/ID/model.safetensors``."""


def check_twins(network: nn.Module, card: Card, path: Path) -> str:
    """Return a sentence on the preprocessing where a file also fits a network with another one, else ``""``.

    Args:
        network: built from ``card``.
        card: the network that the user named.
        path: the user's file; its name and the metadata of safetensors may name a network.

    Raises:
        UsageError: the file names one of the others.
    """
    if _pixels(find_card(card.name)) != _pixels(card):  # the user's own choice
        return ""
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    others = [name for name in _list_same_size(card) if _differs(name, card)][:_MAX_TWINS]
    twins = [name for name in others if _shapes_of(f"{card.library}/{name}") == shapes]
    twins += _list_other_tags(card)
    if not twins:
        return ""
    hint = _read_hint(path, [card.architecture, *twins])
    if hint == card.architecture:
        return ""
    if hint:
        other = find_card(f"{card.library}/{hint}").preprocessing
        found = (
            f"the file says that it is of {hint}, which has the same tensors but expects pixels of mean "
            f"{other.mean} and deviation {other.std} instead of {card.preprocessing.mean} and "
            f"{card.preprocessing.std}"
        )
        fix = f"Take --backbone {card.library}/{hint}; or rename the file, if that is wrong."
        raise UsageError(f"weights {path} for {card.name}", found, fix)
    return (
        f"pixels get the mean {card.preprocessing.mean} and the deviation {card.preprocessing.std} of "
        f"{card.architecture}; the file also fits {', '.join(twins[:3])}, with other ones: name the network "
        "that it was trained as"
    )


def _list_same_size(card: Card) -> list[str]:
    """Return the other architectures of a card's library with the same number of parameters."""
    size = num_parameters(card)
    return [
        name
        for (library, name, _), number in parameter_counts().items()
        if library == card.library and number == size and name != card.architecture
    ]


def _list_other_tags(card: Card) -> list[str]:
    """Return the other published weights of an architecture that expect other pixels, ``NAME.TAG``.

    A tag that the user chose is what the file was trained as; only the default one may be an accident.
    """
    if card.library != "timm" or card.place == "folder":
        return []
    default = timm.get_pretrained_cfg(card.architecture, allow_unregistered=True)
    if default is None or default.tag != card.tag:
        return []
    names = [name for name in timm.list_pretrained(f"{card.architecture}.*") if _differs(name, card)]
    return names[:_MAX_TWINS]


def _differs(name: str, card: Card) -> bool:
    return _pixels(find_card(f"{card.library}/{name}")) != _pixels(card)


def _pixels(card: Card) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return card.preprocessing.mean, card.preprocessing.std


@cache
def _shapes_of(name: str) -> Mapping[str, torch.Size]:
    return {key: value.shape for key, value in build_outline(find_card(name)).state_dict().items()}


def _read_hint(path: Path, names: list[str]) -> str:
    """Return the one of some names that the file's metadata or its name has as a word of its own.

    A file name that is part of another of the names says nothing: the file ``efficientnet_lite0.pth`` of the
    package index holds weights of ``tf_efficientnet_lite0``.
    """
    if path.suffix == ".safetensors":
        with suppress(SafetensorError, OSError), safe_open(path, "pt") as file:
            values = " ".join((file.metadata() or {}).values())
            if found := _find_words(values, names):
                return max(found, key=len)
    tagged = [name for name in names if "." in name]
    folders = " ".join(part.replace("--", " ") for part in path.parts[-_FOLDERS:])  # as in the hub's cache
    if found := _find_words(folders, tagged):
        return max(found, key=len)
    words = set(re.split(r"[^a-z0-9]", path.name.lower()))
    for name in tagged:
        tag = name.partition(".")[2]
        if tag.isalpha() and tag in words:
            return name
    plain = [name for name in names if "." not in name]
    clear = [name for name in plain if not any(name in other and name != other for other in plain)]
    return max(_find_words(path.name, clear), key=len, default="")


def _find_words(text: str, names: list[str]) -> list[str]:
    normal = text.lower().replace("-", "_")
    return [name for name in names if re.search(rf"(?<![a-z0-9_]){re.escape(name)}(?![a-z0-9])", normal)]
