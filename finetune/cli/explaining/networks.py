"""``finetune explain class``, ``invariance`` and ``ablate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli.explaining.arguments import ImagesArgument, OutputFolder

if TYPE_CHECKING:
    from finetune.recipe import Recipe


def class_command(
    recipe: Recipe,
    model: str,
    output: OutputFolder,
    class_name: Annotated[
        str | None,
        typer.Option("--class", help="The class.", show_default="all classes of a model with at most ten"),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Images of each class.")] = 3,
    smooth: Annotated[
        bool, typer.Option("--smooth", help="Shift and blur the image between the steps: less noise.")
    ] = False,
) -> dict[str, Any]:
    """Draw the image that the network scores highest for a class, by gradient ascent."""
    from finetune import api

    return api.explain_class(
        model, output=output, class_name=class_name, seeds=seeds, smooth=smooth, recipe=recipe
    )


def invariance_command(
    recipe: Recipe,
    model: str,
    output: OutputFolder,
    images: ImagesArgument = None,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layer",
            "-l",
            help="At most seven layers, separated by commas (`finetune extract --layers list`).",
            show_default="the stages",
        ),
    ] = None,
    class_name: Annotated[
        str | None,
        typer.Option("--class", help="The class of the images.", show_default="the labels, or predictions"),
    ] = None,
) -> dict[str, Any]:
    """Measure how features and probabilities change when images are moved, scaled and turned."""
    from finetune import api

    return api.explain_invariance(
        model, images or (), output=output, layers=layers, class_name=class_name, recipe=recipe
    )


def ablate_command(
    recipe: Recipe,
    model: str,
    output: OutputFolder,
) -> dict[str, Any]:
    """Measure the error without each block that can be removed, on labelled images (--data)."""
    from finetune import api

    return api.explain_ablate(model, output=output, recipe=recipe)


def influence_command(
    recipe: Recipe,
    model: str,
    output: OutputFolder,
    images: ImagesArgument = None,
) -> dict[str, Any]:
    """Name the training images that cause answers of a solved classifier, by default its mistakes."""
    from finetune import api

    return api.explain_influence(model, images or (), output=output, recipe=recipe)
