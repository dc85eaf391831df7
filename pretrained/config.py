"""Read the ``config.json`` of a folder or a hub repository. Its content is not trusted.

It decides what is built. Every value has bounds, because a huge number of classes or pixels would fill the
memory before any weight is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.errors import UsageError
from pretrained.graph.pooling import POOLS, Pool

MAX_CONFIG_BYTES = 2**24
"""10,000 long label names take one megabyte."""
MAX_CLASSES = 200_000
"""Ten times as many as the largest published classifier has."""
MAX_ARGUMENT = 20_000
"""Largest number among the arguments of a network: widths, depths, pixels."""
MAX_ARGUMENTS = 200
MAX_TEXT_LENGTH = 200
"""In characters: licence, origin and tag are displayed, and written into model cards."""
MAX_NAME_BYTES = 255
"""Longest label name, in UTF-8: that of a class that a network can be trained for, which is a file's name."""
MAX_TAPS = 1_000
"""Points whose features a classifier reads; no network has as many stages."""
MAX_VALUE = 1e38
"""Largest magnitude of a pixel's value: that of 32-bit floating-point numbers."""
TEMPERATURES = (0.01, 100.0)
"""Smallest and largest temperature."""
CROPS = (0.1, 1.0)
"""Smallest and largest ``crop_pct``. The smallest resizes images to ten times the network's size."""
MEANS, STDS = (-1e6, 1e6), (1e-6, 1e6)
"""Smallest and largest mean and standard deviation of a channel: float32 holds what they give."""
_LINE_BREAKERS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Control characters, line breaks, and halves of a character, which UTF-8 has not."""


def read_config(asked: str, path: Path) -> dict[str, Any]:
    """Return the content of a ``config.json``.

    Args:
        asked: the user's request, for the error message.
        path: the file.

    Raises:
        UsageError: it is too large, no JSON, or has no architecture.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
        if len(content) > MAX_CONFIG_BYTES:
            found = f"{path} is larger than {MAX_CONFIG_BYTES:,} bytes, and no network's config"
            raise UsageError(asked, found, "Name a folder in timm's format or of a finished run.")
        config = json.loads(content.decode())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(asked, f"{path} cannot be read: {_shorten(error)}", "Export it again.") from None
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        if isinstance(config, dict) and isinstance(config.get("model_type"), str):
            raise _refuse_transformers(asked, config)
        fix = "Name a folder in timm's format or of a finished run."
        raise UsageError(asked, f"{path} names no architecture", fix)
    return config


def _refuse_transformers(asked: str, config: dict[str, Any]) -> UsageError:
    """Return the refusal of a model of transformers, other than its wrapper of timm's networks."""
    classes = f" ({read_text(config['architectures'])})" if config.get("architectures") else ""
    found = (
        f"it is a model of transformers of the type {read_text(config['model_type'])!r}{classes}; networks "
        "of timm and torchvision are read, and of transformers those in its TimmWrapper"
    )
    fix = "Take the same network from timm (see `finetune backbones`)."
    return UsageError(asked, found, fix)


def describe_invalid_value(error: Exception) -> str:
    """Return a message for a value of the wrong type or range."""
    return f"its config.json holds a value of the wrong kind ({type(error).__name__}: {_shorten(error)})"


def _shorten(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= MAX_TEXT_LENGTH else f"{text[:MAX_TEXT_LENGTH]}..."


# --- values with bounds; each function raises a ValueError that names the key -------------------


def check_preprocessing(view: Mapping[str, Any]) -> None:
    """Check preprocessing against bounds."""
    for side in view["img_size"] if isinstance(view["img_size"], tuple) else [view["img_size"]]:
        read_number("input_size", side, 16, 4096)
        if not isinstance(side, int):
            raise ValueError(f"input_size is {side}, not a whole number")
    read_number("crop_pct", view["crop_pct"], *CROPS)
    for key, bounds in {"mean": MEANS, "std": STDS}.items():
        for value in view[key]:
            read_number(key, value, *bounds)


def read_interpolation(name: str) -> str:
    """Return the name of a Pillow filter; ``bicubic`` for one that is unknown."""
    return name if name in {"nearest", "bilinear", "bicubic", "lanczos"} else "bicubic"


def read_number(key: str, value: Any, low: float, high: float) -> float:
    """Return a number in [low, high]."""
    if type(value) not in (int, float) or not low <= value <= high:
        raise ValueError(f"{key} is {repr(value)[:40]}, not a number between {low:g} and {high:g}")
    return float(value)


def read_num_classes(config: Mapping[str, Any], inner: Mapping[str, Any]) -> int:
    """Return the number of outputs of the classifier; 0 for a network without one."""
    value = config.get("num_classes", inner.get("num_classes", 1000))
    return int(read_number("num_classes", value, 0, MAX_CLASSES))


def read_label_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return label names from a list or ``{index: name}``; earlier releases of timm call them ``labels``."""
    names = config.get("label_names") or config.get("labels") or []
    if isinstance(names, dict):
        names = [names[key] for key in sorted(names, key=int)]
    if not isinstance(names, list) or not all(isinstance(name, str | int) for name in names):
        raise ValueError("label_names are not all text")
    return tuple(read_name(str(name)) for name in names)


def read_name(name: str) -> str:
    """Return a label name on one line and of at most :data:`MAX_NAME_BYTES` bytes; may equal another's.

    Control characters are escaped (``\\n``). The name of a class that a network can be trained for
    (:func:`finetune.data.layout.name_fault`) stays as it is.
    """
    start = name[: MAX_NAME_BYTES + 1]
    escaped = _LINE_BREAKERS.sub(lambda found: found[0].encode("unicode_escape").decode(), start).encode()
    if len(escaped) <= MAX_NAME_BYTES:
        return escaped.decode()
    return f"{escaped[: MAX_NAME_BYTES - 3].decode(errors='ignore')}..."


def read_arguments(config: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return ``model_args``, the arguments of timm's factory, after a check of every number in it."""
    arguments = config.get("model_args") or {}
    numbers = [value for value in _leaves(arguments) if type(value) in (int, float)]
    if len(numbers) > MAX_ARGUMENTS:
        raise ValueError(f"model_args hold {len(numbers):,} numbers")
    for value in numbers:
        read_number("a number of model_args", value, -1, MAX_ARGUMENT)
    return tuple(arguments.items())


def _leaves(value: Any) -> Iterator[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if inner is None:
        yield value
        return
    for item in inner:
        yield from _leaves(item)


def read_target(value: Any) -> tuple[tuple[str, Any], ...]:
    """Return what labels are, as pairs; empty for one class an image."""
    if value is None:
        return ()
    if not isinstance(value, dict) or value.get("kind") not in ("multi", "number"):
        raise ValueError("target is no description of labels")
    if value["kind"] == "multi":
        limits = value.get("thresholds") or []
        if not isinstance(limits, list) or len(limits) > MAX_CLASSES:
            raise ValueError("thresholds are no list of numbers")
        return ("kind", "multi"), ("thresholds", tuple(read_number("threshold", one, 0, 1) for one in limits))
    mean = read_number("target.mean", value.get("mean"), -MAX_VALUE, MAX_VALUE)
    std = read_number("target.std", value.get("std"), 1 / MAX_VALUE, MAX_VALUE)
    margin = value.get("margin")
    margin = None if margin is None else read_number("target.margin", margin, 0, MAX_VALUE)
    return ("kind", "number"), ("mean", mean), ("std", std), ("margin", margin)


def read_taps(value: Any) -> tuple[tuple[str, int, bool], ...]:
    """Return points of a network from ``[[module, number of the call, whether its input], ...]``."""
    taps = value or []
    if not isinstance(taps, list) or len(taps) > MAX_TAPS:
        raise ValueError("taps are no list of places")
    for tap in taps:
        if not isinstance(tap, list) or [type(part) for part in tap] != [str, int, bool]:
            raise ValueError(f"a tap is {repr(tap)[:60]}, not a module, a number and a truth value")
    places = tuple((module, number, at_input) for module, number, at_input in taps)
    if len(set(places)) < len(places):
        raise ValueError("a tap stands there twice")
    return places


def read_pool(value: Any) -> Pool:
    """Return how features are pooled."""
    for pool in POOLS:
        if pool == (value or "auto"):
            return pool
    raise ValueError(f"pool is {repr(value)[:40]}, not one of {', '.join(POOLS)}")


def read_value_range(value: Any) -> tuple[float, float] | None:
    """Return the values that become black and white in images of more than 8 bits; None if none is given."""
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"value_range is {repr(value)[:40]}, not two numbers")
    low, high = (read_number("value_range", one, -MAX_VALUE, MAX_VALUE) for one in value)
    if not low < high:
        raise ValueError(f"value_range is {repr(value)[:40]}, and does not ascend")
    return low, high


def read_text(value: Any) -> str:
    """Return text for display: printable characters of one line, shortened."""
    joined = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value or "")
    return "".join(islice((letter for letter in joined if letter.isprintable()), MAX_TEXT_LENGTH))
