"""Read the ``config.json`` of a folder or a hub page, which a stranger may have written.

It decides what is built, so nothing of it is taken that no network has: a number of classes or of pixels
beyond all measure would fill the memory before a single weight is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import UsageError
from pretrained.graph.pooling import POOLS, Pool

LARGEST_CONFIG = 2**24
"""Bytes. Ten thousand long label names take one megabyte, and few networks know more."""
MOST_CLASSES = 200_000
"""Ten times what any published classifier has."""
LARGEST_ARGUMENT = 20_000
"""Of numbers that shape a network: widths, depths, pixels."""
MOST_ARGUMENTS = 200
LONGEST_TEXT = 200
"""Characters of a licence, an origin or a tag; they are shown, and written into model cards."""
MOST_TAPS = 1_000
"""Places whose features a classifier reads; no network has as many stages."""
TEMPERATURES = (0.01, 100.0)
"""Least and largest that probabilities may be softened by."""
_CROP_MODES = ("center", "squash", "border")


def read_config(asked: str, path: Path) -> dict[str, Any]:
    """Return the content of a ``config.json`` that names an architecture.

    Raises:
        UsageError: it is too large, no JSON, or names none.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_CONFIG + 1)
        if len(content) > LARGEST_CONFIG:
            found = f"{path} is larger than {LARGEST_CONFIG:,} bytes, and no network's config"
            raise UsageError(asked, found, "Name a folder in timm's format or of a finished run.")
        config = json.loads(content.decode())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(asked, f"{path} cannot be read: {_short(error)}", "Export it again.") from None
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        fix = "Name a folder in timm's format or of a finished run."
        raise UsageError(asked, f"{path} names no architecture", fix)
    return config


def describe_fault(error: Exception) -> str:
    """Say in a few words what is wrong with a value."""
    return f"its config.json holds a value of the wrong kind ({type(error).__name__}: {_short(error)})"


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}..."


# --- values, each with its bounds; a ValueError names the key ------------------------------------


def check_view(view: Mapping[str, Any]) -> None:
    """Hold preprocessing to what a recipe may say (section ``input``)."""
    read_number("input_size", view["img_size"], 16, 4096)
    holds = {
        "input_size": isinstance(view["img_size"], int),
        "crop_pct": read_number("crop_pct", view["crop_pct"], 0, 1) > 0,
        "crop_mode": view["crop_mode"] in _CROP_MODES,
        "mean": all(map(math.isfinite, view["mean"])),
        "std": all(0 < value < math.inf for value in view["std"]),
    }
    for key, held in holds.items():
        if not held:
            raise ValueError(f"{key} is out of bounds")


def read_number(key: str, value: Any, low: float, high: float) -> float:
    """Return a number within bounds, both included."""
    if type(value) not in (int, float) or not low <= value <= high:
        raise ValueError(f"{key} is {repr(value)[:40]}, not a number between {low} and {high}")
    return float(value)


def read_num_classes(config: Mapping[str, Any], inner: Mapping[str, Any]) -> int:
    """Return the outputs of the classifier; 0 is a network without one."""
    value = config.get("num_classes", inner.get("num_classes", 1000))
    return int(read_number("num_classes", value, 0, MOST_CLASSES))


def read_label_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a list, or ``{index: name}``; ``labels`` is timm's former word."""
    names = config.get("label_names") or config.get("labels") or ()
    found = [names[key] for key in sorted(names, key=int)] if isinstance(names, dict) else list(names)
    if not all(isinstance(name, (str, int)) for name in found):
        raise ValueError("label_names are not all text")
    return tuple(map(str, found))


def read_arguments(config: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return ``model_args``, which the library's factory takes, with bounds on every number in it."""
    arguments = config.get("model_args") or {}
    numbers = [value for value in _leaves(arguments) if type(value) in (int, float)]
    if len(numbers) > MOST_ARGUMENTS:
        raise ValueError(f"model_args hold {len(numbers):,} numbers")
    for value in numbers:
        read_number("a number of model_args", value, -1, LARGEST_ARGUMENT)
    return tuple(arguments.items())


def _leaves(value: Any) -> Iterator[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if inner is None:
        yield value
        return
    for item in inner:
        yield from _leaves(item)


def read_taps(value: Any) -> tuple[tuple[str, int, bool], ...]:
    """Return places in a network, ``[[module, number of the call, is what it takes], ...]``."""
    taps = value or []
    if not isinstance(taps, list) or len(taps) > MOST_TAPS:
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


def read_text(value: Any) -> str:
    """Return text of one line, shortened: it is shown to people."""
    joined = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value or "")
    return "".join(letter for letter in joined if letter.isprintable())[:LONGEST_TEXT]
