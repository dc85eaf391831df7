"""``finetune explain cam``, ``saliency`` and ``localise``: where in an image the evidence for a class is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli.explaining.arguments import ClassOption, ImagesArgument, LayerOption, OutputFolder

if TYPE_CHECKING:
    from finetune.recipe import Recipe


def cam_command(
    recipe: Recipe,
    model: str,
    output: OutputFolder,
    images: ImagesArgument = None,
    layer: LayerOption = None,
    class_name: ClassOption = None,
    method: Annotated[str, typer.Option("--method", help="grad-cam or layer-cam.")] = "grad-cam",
) -> dict[str, Any]:
    """Draw which regions of images are evidence for a class: class activation maps."""
    from finetune import api

    return api.explain_cam(
        model,
        images or (),
        output=output,
        layer=layer,
        class_name=class_name,
        method=method,
        recipe=recipe,
    )


def saliency_command(
    recipe: Recipe,
    model: str,
    output: OutputFolder,
    images: ImagesArgument = None,
    class_name: ClassOption = None,
    method: Annotated[
        str, typer.Option("--method", help="gradient, smoothgrad, integrated or occlusion.")
    ] = "gradient",
) -> dict[str, Any]:
    """Draw which pixels of images change the score of a class."""
    from finetune import api

    return api.explain_saliency(
        model, images or (), output=output, class_name=class_name, method=method, recipe=recipe
    )


def localise_command(
    recipe: Recipe,
    model: str,
    output: OutputFolder,
    images: ImagesArgument = None,
    class_name: ClassOption = None,
    boxes: Annotated[
        Path | None,
        typer.Option("--boxes", help="A CSV file of true boxes to compare with: path,x0,y0,x1,y1 in pixels."),
    ] = None,
) -> dict[str, Any]:
    """Find a box around the object of each image, from its saliency map."""
    from finetune import api

    return api.explain_localise(
        model, images or (), output=output, class_name=class_name, boxes=boxes, recipe=recipe
    )
