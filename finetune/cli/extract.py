"""``finetune extract``: write the features of any layers as CSV, Parquet or NumPy files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.cli.options import (
    JsonOption,
    PoolOption,
    takes_source,
)
from finetune.cli.output import print_json, print_table
from finetune.cli.processes import GpusOption, ProcessesOption, joined_processes, start_processes
from finetune.errors import UsageError

if TYPE_CHECKING:
    from finetune.recipe import Recipe
    from pretrained.graph.layers import Layer


@takes_source
def extract_command(
    recipe: Recipe,
    layers: Annotated[
        str,
        typer.Option(
            "--layers",
            "-l",
            help="Comma-separated stages, modules and patterns; all, last, pre_logits; list shows them.",
        ),
    ] = "all",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A folder (a table for each layer), or a .csv, .parquet, .npz."),
    ] = None,
    pool: PoolOption = "auto",
    format: Annotated[
        str | None,
        typer.Option("--format", help="csv, parquet or npz.", show_default="the output's suffix, else csv"),
    ] = None,
    gpus: GpusOption = None,
    processes: ProcessesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the features of a network's layers as tables: path, label, split, then the features.

    All layers come from one forward pass. An interrupted extraction is resumed.
    """
    from finetune.recipe.flags import split_words

    wanted = split_words(layers)
    if wanted == ["list"]:
        _list(recipe, as_json)
        return
    if output is None:
        fix = "Add --output FOLDER or --output FILE.csv."
        raise UsageError("finetune extract", "no output was named", fix)
    start_processes(processes, gpus, recipe.device)
    with joined_processes("cuda" if gpus else recipe.device, 0, as_json) as distributed:
        from finetune import api
        from finetune.system.display import Display, SilentDisplay

        display = Display() if distributed.is_main else SilentDisplay()
        done = api.extract(
            recipe=recipe,
            output=output,
            layers=wanted,
            pool=pool,
            format=format,
            display=display,
            distributed=distributed,
        )
        if as_json and distributed.is_main:
            print_json(done)


def _list(recipe: Recipe, as_json: bool) -> None:
    from finetune.system.display import Display

    display = Display()
    with display.busy("loading torch"):
        from finetune.features.network import open_network
    layers = open_network(recipe, display).layers
    rows = [_facts("stage", layer) for layer in layers.all]
    rows += [_facts("module", layer) for layer in layers.modules().values()]
    if as_json:
        print_json(rows, indent=1)
        return
    columns = ("layer", "kind", "from", "size", "num_features", "pool", "depth")
    print_table(columns, ([str(row[column]) for column in columns] for row in rows))


def _facts(kind: str, layer: Layer) -> dict[str, object]:
    return {
        "layer": layer.name,
        "kind": kind if layer.name != "pre_logits" else "head input",
        "from": f"{'input of ' if layer.point.at_input else ''}{layer.point.module}",
        "size": layer.size,
        "num_features": layer.num_features("auto"),
        "pool": layer.pool_of("auto"),
        "depth": f"{layer.share:.2f}",
    }
