"""``finetune explain``: pictures of what a network computes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.cli.explaining import networks, units
from finetune.cli.explaining.arguments import ClassOption, ImagesArgument, LayerOption, OutputFolder
from finetune.cli.options import JsonOption, takes_model
from finetune.cli.output import print_json
from finetune.cli.unknown import RecipeCommand

if TYPE_CHECKING:
    from finetune.recipe import Recipe

app = typer.Typer(
    help="See inside a network: where it looks, and what its layers compute.", no_args_is_help=True
)

app.command("filters", cls=RecipeCommand)(takes_model(units.filters_command))
app.command("maps", cls=RecipeCommand)(takes_model(units.maps_command))
app.command("top", cls=RecipeCommand)(takes_model(units.top_command))
app.command("deconv", cls=RecipeCommand)(takes_model(units.deconv_command))
app.command("evolution", cls=RecipeCommand)(takes_model(units.evolution_command))
app.command("receptive-field", cls=RecipeCommand)(takes_model(units.receptive_field_command))
app.command("class", cls=RecipeCommand)(takes_model(networks.class_command))
app.command("invariance", cls=RecipeCommand)(takes_model(networks.invariance_command))
app.command("ablate", cls=RecipeCommand)(takes_model(networks.ablate_command))


@app.command("cam", cls=RecipeCommand)
@takes_model
def cam_command(
    recipe: Recipe,
    model: str,
    output: OutputFolder,
    images: ImagesArgument = None,
    layer: LayerOption = None,
    class_name: ClassOption = None,
    method: Annotated[str, typer.Option("--method", help="grad-cam or layer-cam.")] = "grad-cam",
    as_json: JsonOption = False,
) -> None:
    """Draw which regions of images are evidence for a class: class activation maps."""
    from finetune import api

    done = api.explain_cam(
        model,
        images or (),
        output=output,
        layer=layer,
        class_name=class_name,
        method=method,
        recipe=recipe,
    )
    if as_json:
        print_json(done)


@app.command("saliency", cls=RecipeCommand)
@takes_model
def saliency_command(
    recipe: Recipe,
    model: str,
    output: OutputFolder,
    images: ImagesArgument = None,
    class_name: ClassOption = None,
    method: Annotated[
        str, typer.Option("--method", help="gradient, smoothgrad, integrated or occlusion.")
    ] = "gradient",
    as_json: JsonOption = False,
) -> None:
    """Draw which pixels of images change the score of a class."""
    from finetune import api

    done = api.explain_saliency(
        model, images or (), output=output, class_name=class_name, method=method, recipe=recipe
    )
    if as_json:
        print_json(done)


@app.command("localise", cls=RecipeCommand)
@takes_model
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
    as_json: JsonOption = False,
) -> None:
    """Find a box around the object of each image, from its saliency map."""
    from finetune import api

    done = api.explain_localise(
        model, images or (), output=output, class_name=class_name, boxes=boxes, recipe=recipe
    )
    if as_json:
        print_json(done)
