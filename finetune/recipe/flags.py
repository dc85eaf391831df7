"""Flags: short names for the most used recipe keys, on the command line and in Python alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import Any, Literal, TypedDict

from finetune.errors import UsageError, suggest
from finetune.recipe.reading import load_recipe, merge_override
from finetune.recipe.schema import Recipe
from finetune.recipe.sections import Augmentation, Optimizer, Resize
from finetune.targets import TargetKind

FLAGS = {
    "backbone": "backbone.name",
    "weights": "backbone.weights",
    "offline": "backbone.offline",
    "data": "data.path",
    "val_fraction": "data.val_fraction",
    "target": "data.target",
    "group_by": "data.group_by",
    "folds": "data.folds",
    "allow_leaks": "data.allow_leaks",
    "workers": "data.workers",
    "img_size": "input.img_size",
    "resize": "input.resize",
    "channels": "input.channels",
    "augmentation": "input.augmentation",
    "strategy": "strategy.name",
    "epochs": "training.epochs",
    "batch_size": "training.batch_size",
    "optimizer": "training.optimizer",
    "lr": "training.lr",
    "weight_decay": "training.weight_decay",
    "budget": "budget",
    "seed": "seed",
    "device": "device",
}
"""The recipe key that each flag sets."""


class Flags(TypedDict, total=False):
    """The flags as keyword arguments; docs/recipe.md describes each under its recipe key."""

    backbone: str | None
    weights: str | None
    offline: bool | None
    data: str | None
    val_fraction: float | None
    target: TargetKind | None
    group_by: str | None
    folds: int | None
    allow_leaks: bool | None
    workers: int | None
    img_size: int | tuple[int, int] | None
    resize: Resize | None
    channels: Literal["rgb", "grey", "array"] | int | None
    augmentation: Augmentation | None
    strategy: str | None
    epochs: int | None
    batch_size: int | None
    optimizer: Optimizer | None
    lr: float | None
    weight_decay: float | None
    budget: str | None
    seed: int | None
    device: str | None


def build_recipe(
    source: Recipe | str | None, flags: Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """Read a recipe, and apply overrides and flags to it.

    Args:
        source: a recipe, the name of a shipped one, the path of a YAML file, or None for the defaults.
        flags: values of flags by name, also paths, and the image size as text; None for a flag that was
            not given.
        overrides: values by dotted key.

    Raises:
        UsageError: there is no such flag, a flag contradicts an override, or the recipe is invalid.
    """
    values = dict(overrides or {})
    for name, value in flags.items():
        if name not in FLAGS:
            fix = f"Take one of {', '.join(FLAGS)}, or settings={{'section.key': value}}."
            raise UsageError(f"{name}={value}", f"there is no such argument{suggest(name, FLAGS)}", fix)
        if value is not None:
            merge_override(values, FLAGS[name], _read_flag(name, value))
    return load_recipe(source, values)


def _read_flag(name: str, value: Any) -> Any:
    if isinstance(value, PathLike):
        return fspath(value)
    # A command line gives text, of which numbers are meant as such.
    is_number = name in ("img_size", "channels") and isinstance(value, str) and value.isdecimal()
    return int(value) if is_number else value


def split_words(words: str | Sequence[str]) -> list[str]:
    """Return the words of a comma-separated list; a sequence is such a list already."""
    given = words.split(",") if isinstance(words, str) else words
    return [word.strip() for word in given if word.strip()]
