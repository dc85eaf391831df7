"""Flags that all commands on features share, and the recipe that they make."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.errors import UsageError, suggest

if TYPE_CHECKING:
    from finetune.recipe import Recipe
    from pretrained.pooling import Pool

BackboneOption = Annotated[
    str | None, typer.Option("--backbone", "-b", help="A timm or torchvision name, or a finished run.")
]
WeightsOption = Annotated[
    str | None, typer.Option("--weights", help="A .safetensors or .pth file, or a folder with one.")
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data", "-d", help="A folder of images, with class folders or without, a .zip, a CSV, a run."
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Another key of the recipe; may be repeated.", metavar="SECTION.KEY=VALUE"),
]
ImgSizeOption = Annotated[
    int | None,
    typer.Option("--img-size", help="Height and width in pixels.", show_default="the weights' own"),
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", help="Decoding processes.", show_default="auto")
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Same seed, same numbers.", show_default="0")]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.", show_default="auto")
]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Never ask the network.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result to stdout as one JSON object.")]
PoolOption = Annotated[
    str,
    typer.Option("--pool", help="auto, token, avg, max, avgmax, grid2 or flatten (docs/features.md)."),
]

_KEYS = {
    "backbone": "backbone.name",
    "weights": "backbone.weights",
    "offline": "backbone.offline",
    "data": "data.path",
    "workers": "data.workers",
    "img_size": "input.img_size",
    "seed": "seed",
    "device": "device",
}


def read_source(assignments: list[str] | None, **flags: Any) -> Recipe:
    """Return the recipe that flags and ``--set`` make; a flag that was not given stays at its default."""
    from finetune.recipe import load_recipe, merge_override, parse_assignments

    overrides = parse_assignments(assignments or [])
    for flag, value in flags.items():
        if value is not None and value is not False:
            merge_override(overrides, _KEYS[flag], value)
    return load_recipe(None, overrides)


def read_pool(word: str) -> Pool:
    """Return the pool that a word means.

    Raises:
        UsageError: there is none.
    """
    from pretrained.pooling import POOLS

    for pool in POOLS:
        if pool == word:
            return pool
    found = f"there is no such pool{suggest(word, POOLS)}"
    raise UsageError(f"--pool {word}", found, f"Take {', '.join(POOLS)}.")


def split_words(text: str) -> list[str]:
    """Return the parts of a list with commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def default_folder(command: str) -> Path:
    """Return ``runs/<time>-<command>``."""
    return Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{command}"
