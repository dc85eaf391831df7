"""``finetune similar`` and ``finetune map``: find similar images, and draw a feature space."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.cli.options import (
    JsonOption,
    OutputOption,
    PoolOption,
    takes_source,
)
from finetune.cli.output import print_json, print_table
from finetune.errors import UsageError

if TYPE_CHECKING:
    from finetune.features.similar import Method
    from finetune.recipe import Recipe

LayerOption = Annotated[
    str, typer.Option("--layer", "-l", help="A stage or a module (`finetune extract --layers list`).")
]


@takes_source
def similar_command(
    recipe: Recipe,
    image: Annotated[Path, typer.Argument(help="The query image.")],
    layer: LayerOption = "last",
    top: Annotated[int, typer.Option("--top", min=1, max=1000, help="Number of images to find.")] = 9,
    output: OutputOption = None,
    pool: PoolOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Find the images most similar to a given one: similar.csv, similar.png."""
    from finetune.system.display import Display

    display = Display()
    with display.busy("loading torch"):
        from finetune.features.similar import find_similar
        from finetune.runs.folder import default_folder
        from pretrained.graph.pooling import read_pool
    rows = find_similar(
        recipe, image, layer, top, output or default_folder("similar"), read_pool(pool), display
    )
    if as_json:
        print_json(rows)
        return
    cells = [[str(row["rank"]), f"{row['similarity']:.4f}", row["label"], row["path"]] for row in rows]
    print_table(("rank", "similarity", "label", "path"), cells)


@takes_source
def map_command(
    recipe: Recipe,
    layer: LayerOption = "last",
    method: Annotated[str, typer.Option("--method", help="pca, or umap if it is installed.")] = "pca",
    output: OutputOption = None,
    pool: PoolOption = "auto",
) -> None:
    """Draw a layer's feature space: one point per image, coloured by class, in map.png and map.csv."""
    if method not in ("pca", "umap"):
        raise UsageError(f"--method {method}", "there is no such method", "Use pca or umap.")
    from finetune.system.display import Display

    display = Display()
    with display.busy("loading torch"):
        from finetune.features.similar import draw_feature_map
        from finetune.runs.folder import default_folder
        from pretrained.graph.pooling import read_pool
    folder = output or default_folder("map")
    kind: Method = "umap" if method == "umap" else "pca"
    draw_feature_map(recipe, layer, kind, folder, read_pool(pool), display)
