"""What features depend on beside their pictures and their place in the network."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from finetune.data.loader import Placement
from finetune.data.pictures import decoder_facts
from finetune.runtime import Precision, describe_environment
from pretrained.catalog import Card

_VERSIONS = ("torch", "torchvision", "timm", "pillow", "threads", "gpu", "cuda", "processor")
"""Of the environment: under other values the last bits of a feature may differ."""


def describe_source(
    card: Card, placement: Placement, precision: Precision, deterministic: bool
) -> dict[str, Any]:
    """Return network, view, arithmetic, versions and hardware; weights are the caller's to add."""
    environment = describe_environment(placement.device)
    return {
        "backbone": card.name,
        "architecture": card.architecture,
        "model_args": [[key, repr(value)] for key, value in card.model_args],
        "input": card.preprocessing.to_dict(),
        "precision": precision,
        "deterministic": deterministic,
        "decoder": decoder_facts(),
        "channels_last": placement.channels_last,
        "environment": {key: environment[key] for key in _VERSIONS},
    }


def digest_of(values: Any) -> str:
    """Return the sha256 of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
