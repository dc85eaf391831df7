"""The flags that all commands on features share, and the recipe that is built from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from finetune.cli.output import handled_errors, print_json

if TYPE_CHECKING:
    from finetune.recipe import Recipe

OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="A new folder.", show_default="runs/<time>-<command>"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result to stdout as one JSON object.")]
PoolOption = Annotated[
    str,
    typer.Option("--pool", help="auto, token, avg, max, avgmax, grid2 or flatten (docs/features.md)."),
]

_FLAGS: dict[str, tuple[Any, Any]] = {
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
    ),
    "weights": (
        Annotated[
            str | None, typer.Option("--weights", help="A .safetensors or .pth file, or a folder with one.")
        ],
        None,
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
    ),
    "img_size": (
        Annotated[
            str | None,
            typer.Option(
                "--img-size",
                help="In pixels: one side, or HEIGHTxWIDTH.",
                show_default="the weights' own",
                metavar="SIZE",
            ),
        ],
        None,
    ),
    "resize": (
        Annotated[
            str | None,
            typer.Option(
                "--resize",
                help="How other aspect ratios fit: crop, squash or pad.",
                show_default="the weights' own",
                metavar="NAME",
            ),
        ],
        None,
    ),
    "channels": (
        Annotated[
            str | None,
            typer.Option(
                "--channels",
                help="rgb (8 bits), or in full depth: grey, or a number.",
                show_default="auto",
                metavar="NAME|N",
            ),
        ],
        None,
    ),
    "workers": (
        Annotated[int | None, typer.Option("--workers", help="Decoding processes.", show_default="auto")],
        None,
    ),
    "seed": (
        Annotated[int | None, typer.Option("--seed", help="Random seed.", show_default="0")],
        None,
    ),
    "device": (
        Annotated[
            str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.", show_default="auto")
        ],
        None,
    ),
    "assignments": (
        Annotated[
            list[str] | None,
            typer.Option(
                "--set", help="Another key of the recipe; may be repeated.", metavar="SECTION.KEY=VALUE"
            ),
        ],
        None,
    ),
    "offline": (
        Annotated[bool, typer.Option("--offline", help="Never ask the network.")],
        False,
    ),
}
"""Annotation and default of each flag."""


_MODEL = Annotated[
    str, typer.Argument(help="A finished run, an exported folder, or a backbone's name.", metavar="MODEL")
]


def takes_source(command: Callable[..., None]) -> Callable[..., None]:
    """Add the flags that choose a network and images to a command, which gets the recipe built from them.

    Errors of the command become messages and exit codes.

    Args:
        command: function whose first parameter is ``recipe``.
    """
    return _take_flags(command, tuple(_FLAGS))


def takes_model(command: Callable[..., dict[str, Any]]) -> Callable[..., None]:
    """Add the same flags to a command whose first argument is the model, and ``--json``.

    Args:
        command: function whose first parameters are ``recipe``, without a backbone, and ``model``. What it
            returns is printed if ``--json`` is given.
    """

    @wraps(command)
    def print_result(recipe: Recipe, as_json: bool, **arguments: Any) -> None:
        done = command(recipe, **arguments)
        if as_json:
            print_json(done)

    as_json = Parameter("as_json", Parameter.POSITIONAL_OR_KEYWORD, default=False)
    parameters = [*signature(command).parameters.values(), as_json]
    print_result.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return _take_flags(print_result, tuple(name for name in _FLAGS if name != "backbone"))


def _take_flags(command: Callable[..., None], names: Sequence[str]) -> Callable[..., None]:
    hints = get_type_hints(command, localns={"Recipe": object}, include_extras=True)
    hints |= {"model": _MODEL, "as_json": JsonOption}
    own = [
        parameter.replace(annotation=hints[name])
        for name, parameter in signature(command).parameters.items()
        if name != "recipe"
    ]
    shared = [
        Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=_FLAGS[name][1], annotation=_FLAGS[name][0])
        for name in names
    ]

    @wraps(command)
    def wrapper(**arguments: Any) -> None:
        flags = {name: arguments.pop(name) for name in names}
        with handled_errors(arguments.get("as_json", False)):
            command(_build_recipe(flags), **arguments)

    required = [parameter for parameter in own if parameter.default is Parameter.empty]
    parameters = [*required, *shared, *(parameter for parameter in own if parameter not in required)]
    wrapper.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


def _build_recipe(flags: dict[str, Any]) -> Recipe:
    """Return the recipe; flags that were not given keep the recipe's defaults."""
    from finetune.recipe import parse_assignments
    from finetune.recipe.flags import build_recipe

    overrides = parse_assignments(flags.pop("assignments") or [])
    given = {name: value for name, value in flags.items() if value != _FLAGS[name][1]}
    return build_recipe(None, given, overrides)
