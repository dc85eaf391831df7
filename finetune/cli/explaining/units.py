"""``finetune explain filters``, ``maps``, ``top``, ``deconv``, ``evolution`` and ``receptive-field``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli.explaining.arguments import ClassOption, ImagesArgument, OutputFolder
from finetune.errors import UsageError

if TYPE_CHECKING:
    from finetune.recipe import Recipe

LastLayerOption = Annotated[
    str | None,
    typer.Option(
        "--layer",
        "-l",
        help="A stage or a module (`finetune extract --layers list`).",
        show_default="the last stage that is a map",
    ),
]
MapsOption = Annotated[
    str | None,
    typer.Option(
        "--maps",
        help="Numbers of feature maps, from 0, separated by commas.",
        show_default="the strongest",
        metavar="N,N...",
    ),
]


def filters_command(
    recipe: Recipe,
    model: str,
    output: OutputFolder,
    images: ImagesArgument = None,
    layer: Annotated[
        str | None, typer.Option("--layer", "-l", help="A convolution.", show_default="the first")
    ] = None,
) -> dict[str, Any]:
    """Draw the kernels of a convolution; of one that reads no colours the norms, and what excites it."""
    from finetune import api

    return api.explain_filters(model, images or (), output=output, layer=layer, recipe=recipe)


def maps_command(
    recipe: Recipe,
    model: str,
    output: OutputFolder,
    images: ImagesArgument = None,
    layer: LastLayerOption = None,
    class_name: ClassOption = None,
) -> dict[str, Any]:
    """Draw the feature maps of images: the strongest, and those that add most to a class score."""
    from finetune import api

    return api.explain_maps(
        model, images or (), output=output, layer=layer, class_name=class_name, recipe=recipe
    )


def top_command(
    recipe: Recipe,
    model: str,
    output: OutputFolder,
    images: ImagesArgument = None,
    layer: Annotated[
        str | None,
        typer.Option(
            "--layer",
            "-l",
            help="Comma-separated stages, modules and patterns (`finetune extract --layers list`).",
            show_default="all stages",
        ),
    ] = None,
    maps: MapsOption = None,
) -> dict[str, Any]:
    """Find the nine images that excite each feature map most, and the patches that its units see."""
    from finetune import api

    return api.explain_top(
        model, images or (), output=output, layer=layer, maps=_read_numbers(maps), recipe=recipe
    )


def deconv_command(
    recipe: Recipe,
    model: str,
    output: OutputFolder,
    images: ImagesArgument = None,
    layer: LastLayerOption = None,
    maps: MapsOption = None,
    method: Annotated[str, typer.Option("--method", help="deconv or guided.")] = "deconv",
) -> dict[str, Any]:
    """Project what excited feature maps back to pixels: deconvnet, for networks of ReLU."""
    from finetune import api

    return api.explain_deconv(
        model,
        images or (),
        output=output,
        layer=layer,
        maps=_read_numbers(maps),
        method=method,
        recipe=recipe,
    )


def evolution_command(
    recipe: Recipe,
    model: str,
    output: OutputFolder,
    images: ImagesArgument = None,
    layer: LastLayerOption = None,
    maps: MapsOption = None,
) -> dict[str, Any]:
    """Show what excited feature maps after some epochs of a run, which kept their weights.

    The run needs --set training.keep_epochs=[1,2,5,10].
    """
    from finetune import api

    return api.explain_evolution(
        model, images or (), output=output, layer=layer, maps=_read_numbers(maps), recipe=recipe
    )


def receptive_field_command(
    recipe: Recipe,
    model: str,
    output: OutputFolder,
    images: ImagesArgument = None,
    layer: Annotated[
        str | None,
        typer.Option(
            "--layer",
            "-l",
            help="Comma-separated stages, modules and patterns (`finetune extract --layers list`).",
            show_default="all convolutions, poolings and stages",
        ),
    ] = None,
) -> dict[str, Any]:
    """Measure what the units of each layer can see, exactly, and how much of it they make use of."""
    from finetune import api

    return api.explain_receptive_field(model, images or (), output=output, layer=layer, recipe=recipe)


def _read_numbers(words: str | None) -> list[int] | None:
    """Return the numbers in ``--maps``; None if there are none.

    Raises:
        UsageError: a word is no number.
    """
    if words is None:
        return None
    found = [word.strip() for word in words.split(",")]
    for word in found:
        if not (word.isascii() and word.isdecimal() and len(word) < 9):
            fix = "Give the numbers of feature maps, from 0, separated by commas: --maps 3,17."
            raise UsageError(f"--maps {words}", f"{word!r} is not the number of a feature map", fix)
    return [int(word) for word in found]
