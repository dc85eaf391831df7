"""``config.json`` of a model folder: timm's for timm networks, the same shape for others."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models._hub import save_config_for_hf
from torch import nn

from finetune import __version__
from finetune.errors import UsageError
from finetune.system.temporary import temporary_folder
from finetune.targets import read_target
from pretrained.catalog import Card
from pretrained.config import read_config
from pretrained.stage_classifier import StageClassifier

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)


_KINDS = {"torchvision": "of torchvision", "zoo": "of the published networks"}
"""What timm says of a network that it does not have."""


def loads_in_timm(card: Card) -> bool:
    """Return whether plain timm builds the same network from its architecture alone."""
    return card.source == "timm" and card.head != "drop_fc" and not card.taps


def find_base_model(card: Card) -> str:
    """Return the hub id of the weights that a network started from, ``""`` where there is none.

    For a network that started from another run's folder, it is the id recorded in that folder.
    """
    if card.place == "hub":
        return card.location.partition("@")[0]
    path = Path(card.location, "config.json")
    if card.place != "folder" or not path.is_file():
        return ""
    try:
        ours = read_config(card.name, path).get("finetune")
    except UsageError:
        return ""
    base = ours.get("base_model") if isinstance(ours, Mapping) else ""
    return base if isinstance(base, str) and _HUB_ID.fullmatch(base) else ""


def build_config(card: Card, network: nn.Module, sha256: str = "") -> dict[str, Any]:
    """Return ``config.json``: timm's for timm networks, the same shape for others."""
    ours = {
        "version": __version__,
        "library": card.library,
        "head": card.head,
        "dropout": card.dropout,
        "sha256": sha256,
        "taps": [list(tap) for tap in card.taps],
        "pool": card.pool,
        "temperature": card.temperature,
        **_value_range(card),
        **_bands(card),
        **({"target": dict(card.target)} if card.target else {}),
        "base_model": find_base_model(card),
    }
    config = _timm_config(card, network) if card.source == "timm" else _own_config(card)
    if card.target:
        config["problem_type"] = read_target(dict(card.target)).problem  # of Hugging Face transformers
    if not loads_in_timm(card):
        ours["architecture"] = config["architecture"]
        config["architecture"] = name_for_timm(card)
    return config | {"finetune": ours}


def _value_range(card: Card) -> dict[str, list[float]]:
    value_range = card.preprocessing.value_range
    return {"value_range": list(value_range)} if value_range is not None else {}


def _bands(card: Card) -> dict[str, Any]:
    view = card.preprocessing
    return {"kind": "bands", "channels": view.channels} if view.kind == "bands" else {}


def name_for_timm(card: Card) -> str:
    """Return an architecture that timm does not know, so that plain timm refuses the folder and says why.

    timm would build the network of this name with another classifier, load what fits with a warning, and
    predict nonsense. It shows the text up to the first dot.
    """
    kind = _KINDS.get(card.source, "on several stages" if card.taps else "with a changed head")
    return f"{card.architecture} {kind}, which only finetune loads"


def _timm_config(card: Card, network: nn.Module) -> dict[str, Any]:
    labels = {"label_names": list(card.label_names)}
    network = network.network if isinstance(network, StageClassifier) else network
    arguments = dict.fromkeys(getattr(network, "left_out", ()), False)
    with temporary_folder() as folder:  # timm writes its config to a file only
        path = folder / "config.json"
        save_config_for_hf(
            network,
            str(path),
            model_config=labels,
            model_args=arguments,
            data_config=card.preprocessing.to_timm(),
        )
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    inner = config["pretrained_cfg"]
    for stale in ("label_names", "label_descriptions", "license", "origin_url", "paper_ids", "paper_name"):
        inner.pop(stale, None)  # timm's entries describe its default weights, which may be others
    inner |= _passport(card)
    # transformers passes the number of classes itself, and refuses to be given it twice.
    config["model_args"] = {key: value for key, value in config["model_args"].items() if key != "num_classes"}
    return config | {"num_classes": card.num_classes}


def _own_config(card: Card) -> dict[str, Any]:
    return {
        "architecture": card.architecture,
        "num_classes": card.num_classes,
        "label_names": list(card.label_names),
        "pretrained_cfg": card.preprocessing.to_timm() | {"num_classes": card.num_classes} | _passport(card),
    }


def _passport(card: Card) -> dict[str, str]:
    origin = "paper_ids" if card.origin.lower().startswith("arxiv") else "origin_url"
    return {"tag": card.tag, "license": card.license, origin: card.origin}
