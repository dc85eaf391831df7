"""The flags that all commands on features share, and the recipe that they make."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from finetune.cli.output import refusals
from finetune.errors import UsageError, suggest

if TYPE_CHECKING:
    from finetune.recipe import Recipe
    from pretrained.graph.pooling import Pool

OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="A new folder.", show_default="runs/<time>-<command>"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result to stdout as one JSON object.")]
PoolOption = Annotated[
    str,
    typer.Option("--pool", help="auto, token, avg, max, avgmax, grid2 or flatten (docs/features.md)."),
]

_FLAGS: dict[str, tuple[Any, Any, str | None]] = {
    "backbone": (
        Annotated[
            str | None,
            typer.Option(
                "--backbone",
                "-b",
                help="A timm or torchvision name, or a finished run.",
                show_default="the best whose weights are here",
            ),
        ],
        None,
        "backbone.name",
    ),
    "weights": (
        Annotated[
            str | None, typer.Option("--weights", help="A .safetensors or .pth file, or a folder with one.")
        ],
        None,
        "backbone.weights",
    ),
    "data": (
        Annotated[
            str | None,
            typer.Option(
                "--data",
                "-d",
                help="A folder of images, in class folders or not, a .zip, a CSV, sample:digits, a run.",
            ),
        ],
        None,
        "data.path",
    ),
    "img_size": (
        Annotated[
            int | None,
            typer.Option("--img-size", help="Height and width in pixels.", show_default="the weights' own"),
        ],
        None,
        "input.img_size",
    ),
    "workers": (
        Annotated[int | None, typer.Option("--workers", help="Decoding processes.", show_default="auto")],
        None,
        "data.workers",
    ),
    "seed": (
        Annotated[int | None, typer.Option("--seed", help="Same seed, same numbers.", show_default="0")],
        None,
        "seed",
    ),
    "device": (
        Annotated[
            str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.", show_default="auto")
        ],
        None,
        "device",
    ),
    "assignments": (
        Annotated[
            list[str] | None,
            typer.Option(
                "--set", help="Another key of the recipe; may be repeated.", metavar="SECTION.KEY=VALUE"
            ),
        ],
        None,
        None,
    ),
    "offline": (
        Annotated[bool, typer.Option("--offline", help="Never ask the network.")],
        False,
        "backbone.offline",
    ),
}
"""Annotation, default, and the key of the recipe that each flag sets."""


def takes_source(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the flags that choose a network and images, and hand it the recipe that they make.

    Its errors become messages and exit codes.
    """
    hints = get_type_hints(command, localns={"Recipe": object}, include_extras=True)
    own = [
        parameter.replace(annotation=hints[name])
        for name, parameter in signature(command).parameters.items()
        if name != "recipe"
    ]
    shared = [
        Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=annotation)
        for name, (annotation, default, _) in _FLAGS.items()
    ]

    @wraps(command)
    def take(**words: Any) -> None:
        flags = {name: words.pop(name) for name in _FLAGS}
        with refusals(words.get("as_json", False)):
            command(_read(flags), **words)

    arguments = [parameter for parameter in own if parameter.default is Parameter.empty]
    every = [*arguments, *shared, *(parameter for parameter in own if parameter not in arguments)]
    take.__signature__ = Signature(every)  # type: ignore[attr-defined]
    take.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
    return take


def _read(flags: dict[str, Any]) -> Recipe:
    """A flag that was not given stays at its default."""
    from finetune.recipe import load_recipe, merge_override, parse_assignments

    overrides = parse_assignments(flags["assignments"] or [])
    for name, (_, default, key) in _FLAGS.items():
        if key is not None and flags[name] != default:
            merge_override(overrides, key, flags[name])
    return load_recipe(None, overrides)


def read_pool(word: str) -> Pool:
    """Return the pool that a word means.

    Raises:
        UsageError: there is none.
    """
    from pretrained.graph.pooling import POOLS

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
