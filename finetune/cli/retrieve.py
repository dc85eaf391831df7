"""``finetune similar`` and ``finetune map``: pictures by their features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.cli.options import (
    BackboneOption,
    DataOption,
    DeviceOption,
    ImgSizeOption,
    JsonOption,
    OfflineOption,
    PoolOption,
    SeedOption,
    SetOption,
    WeightsOption,
    WorkersOption,
    default_folder,
    read_pool,
    read_source,
)
from finetune.cli.refusals import hand_over, refusals
from finetune.cli.tables import print_table
from finetune.errors import UsageError

if TYPE_CHECKING:
    from finetune.job.retrieve import Method

LayerOption = Annotated[
    str, typer.Option("--layer", "-l", help="A stage or a module (`finetune extract --layers list`).")
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="A new folder.", show_default="runs/<time>-<command>"),
]


def similar_command(
    image: Annotated[Path, typer.Argument(help="The picture that is asked about.")],
    backbone: BackboneOption = None,
    data: DataOption = None,
    layer: LayerOption = "last",
    top: Annotated[int, typer.Option("--top", min=1, max=1000, help="How many pictures.")] = 9,
    output: OutputOption = None,
    pool: PoolOption = "auto",
    weights: WeightsOption = None,
    img_size: ImgSizeOption = None,
    workers: WorkersOption = None,
    device: DeviceOption = None,
    assignments: SetOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the pictures that are most like one: similar.csv, and similar.png to look at."""
    with refusals(as_json):
        recipe = read_source(
            assignments,
            backbone=backbone,
            data=data,
            weights=weights,
            img_size=img_size,
            workers=workers,
            device=device,
            offline=offline,
        )
        from finetune.display import Display

        display = Display()
        with display.busy("loading torch"):
            from finetune.job.retrieve import find_similar
        rows = find_similar(
            recipe, image, layer, top, output or default_folder("similar"), read_pool(pool), display
        )
        if as_json:
            hand_over(json.dumps(rows) + "\n")
            return
        cells = [[str(row["rank"]), f"{row['similarity']:.4f}", row["label"], row["path"]] for row in rows]
        print_table(("rank", "similarity", "label", "path"), cells)


def map_command(
    backbone: BackboneOption = None,
    data: DataOption = None,
    layer: LayerOption = "last",
    method: Annotated[str, typer.Option("--method", help="pca, or umap where it is installed.")] = "pca",
    output: OutputOption = None,
    pool: PoolOption = "auto",
    weights: WeightsOption = None,
    img_size: ImgSizeOption = None,
    workers: WorkersOption = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    assignments: SetOption = None,
    offline: OfflineOption = False,
) -> None:
    """Draw a layer's feature space: every picture a point, coloured by class, in map.png and map.csv."""
    with refusals():
        recipe = read_source(
            assignments,
            backbone=backbone,
            data=data,
            weights=weights,
            img_size=img_size,
            workers=workers,
            seed=seed,
            device=device,
            offline=offline,
        )
        if method not in ("pca", "umap"):
            raise UsageError(f"--method {method}", "there is no such method", "Take pca or umap.")
        from finetune.display import Display

        display = Display()
        with display.busy("loading torch"):
            from finetune.job.retrieve import draw_feature_map
        folder = output or default_folder("map")
        kind: Method = "umap" if method == "umap" else "pca"
        draw_feature_map(recipe, layer, kind, folder, read_pool(pool), display)
