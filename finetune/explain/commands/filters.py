"""``finetune explain filters``: the kernels of a convolution.

::

    filters.png     kernels on the three colours, or on one channel each, as images; of others their norms
    projections.png what excites the strongest of the others, projected to pixels, if there are images
    filters.csv     norm and largest weight of every filter
    filters.npz     ``kernels`` (O, I, k, l), ``norms`` (O, I) float32
    explain.json    model, layer, sizes, number of dead filters, versions

Shape legend: O output channels, I input channels of each group, k l height and width of a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from finetune.errors import UsageError
from finetune.explain.commands.layers import find_map_layers
from finetune.explain.commands.model import open_model
from finetune.explain.commands.projections import draw_projected, project
from finetune.explain.commands.record import say_written, write_arrays, write_record
from finetune.explain.commands.strongest import (
    Excited,
    Pictures,
    find_strongest,
    open_pictures,
    read_excited,
)
from finetune.explain.filters import Filters, find_convolution, read_filters
from finetune.features.network import Network
from finetune.plots.overlay import colour_heat
from finetune.plots.sheet import Grid, Tile, write_grid
from finetune.plots.units import crop, draw_mosaic, draw_projection, fit_square
from finetune.recipe import Recipe
from finetune.runs.files import write_csv
from finetune.runs.new_folder import new_folder
from finetune.runs.outcome import translated_errors
from finetune.system.display import Display

METHOD = "filters"
MOST_DRAWN = 400
"""Kernels that are drawn, the largest; the npz file has all."""
_NUM_PROJECTED = 12
_CELL, _LEAST = 44, 440
"""Pixels of a kernel's image, and of the smallest sheet."""
_SIDE = 132
_BRIGHTEST = 99.5
"""Percentile of the norms that is drawn brightest."""
_COLUMNS = ("filter", "norm", "largest", "mean")


def explain_filters(
    recipe: Recipe, images: Sequence[str], output: Path, layer: str | None, display: Display
) -> dict[str, Any]:
    """Write the kernels of a convolution.

    Args:
        recipe: names the model, and the ``--data``; settings of input and machine.
        images: images to project from, for a convolution that does not read colours; there may be none.
        output: a new folder.
        layer: name of the convolution; None for the first.
        display: shows progress.

    Returns:
        The content of ``explain.json``, and the path of the output.

    Raises:
        FinetuneError: the command fails; the subclass gives the exit code (docs/errors.md).
    """
    with translated_errors():
        network = open_model(recipe, display)
        name, convolution = find_convolution(network.backbone.network, layer)
        filters = read_filters(convolution)
        pictures = None
        if (images or recipe.data.path) and not filters.is_picture:
            pictures = open_pictures(recipe, network, images, output, display)
        with new_folder(output) as folder:
            projected, reason = list[Tile](), ""
            if pictures is not None:
                projected, reason = _project(pictures, name, filters, folder, display)
            _write_tables(filters, folder)
            write_grid(folder / "filters.png", _lay_out(network, name, filters))
            if projected:
                write_grid(folder / "projections.png", _lay_out_projections(name, projected))
            facts = _describe(name, convolution, filters) | {
                "num_projected": len(projected) // 2,
                "no_projections": reason or None,
            }
            record = write_record(folder, METHOD, network, facts)
        return say_written(output, record, display)


def _describe(name: str, convolution: nn.Conv2d, filters: Filters) -> dict[str, Any]:
    return {
        "layer": name,
        "num_filters": len(filters.kernels),
        "kernel_size": list(filters.kernels.shape[2:]),
        "stride": list(convolution.stride),
        "groups": convolution.groups,
        "num_dead": filters.num_dead,
    }


def _write_tables(filters: Filters, folder: Path) -> None:
    flat = filters.kernels.flatten(1)
    values = zip(filters.strengths, flat.abs().amax(dim=1), flat.mean(dim=1), strict=True)
    rows = [(number, *(float(value) for value in row)) for number, row in enumerate(values)]
    write_csv(folder / "filters.csv", rows, _COLUMNS)
    write_arrays(folder / "filters.npz", kernels=filters.kernels.numpy(), norms=filters.norms.numpy())


def _lay_out(network: Network, name: str, filters: Filters) -> Grid:
    shape = " x ".join(map(str, filters.kernels.shape))
    title = f"{name} of {network.backbone.card.name}: {shape} weights"
    dead = f" {filters.num_dead} filters are zero beside the others." if filters.num_dead else ""
    if filters.is_picture:
        tile = _draw_kernels(filters)
        said = (
            "Each square is a filter, the largest norm at the top left, each in its own scale; grey is zero."
        )
    else:
        tile = _draw_norms(filters)
        weights = math.prod(filters.kernels.shape[2:])
        what = f"Norms of the {weights} weights" if weights > 1 else "Magnitudes of the weights"
        said = (
            f"{what} between each filter (row, by number, from the top) and each of its "
            f"{filters.kernels.shape[1]} input channels (column); bright is large."
        )
    return Grid(title, [[tile]], notes=[said + dead], side=max(tile.image.size))  # type: ignore[union-attr]


def _draw_kernels(filters: Filters) -> Tile:
    drawn = filters.order()[:MOST_DRAWN]
    columns = math.ceil(math.sqrt(len(drawn)))
    # A filter that is zero beside the others would look like any other in a scale of its own.
    kernels = filters.kernels * ~filters.is_dead[:, None, None, None]
    images = [draw_projection(np.broadcast_to(one, (3, *one.shape[1:]))) for one in kernels[drawn].numpy()]
    side = max(_LEAST, columns * _CELL) // columns * columns
    return Tile(draw_mosaic(images, side, columns), (f"{len(drawn)} of {len(filters.kernels)} filters",))


def _draw_norms(filters: Filters) -> Tile:
    norms = filters.norms.numpy()
    brightest = max(float(np.percentile(norms, _BRIGHTEST)), np.finfo(np.float32).tiny)
    # Each axis is scaled by itself, since there may be many more channels than filters.
    picture = colour_heat(norms / brightest).resize((_LEAST, _LEAST), Image.Resampling.NEAREST)
    return Tile(picture, (f"{norms.shape[0]} filters x {norms.shape[1]} channels",))


# --- what excites the strongest filters -----------------------------------------------------------


def _project(
    pictures: Pictures, name: str, filters: Filters, folder: Path, display: Display
) -> tuple[list[Tile], str]:
    """Return tiles of projections and patches in turns; or none, and why there are none."""
    network = pictures.network
    [layer] = find_strongest(pictures, find_map_layers(network, name), folder, display)
    excited = layer.find_excited(network, filters.order()[:_NUM_PROJECTED])
    best = [units[0] for units in excited.values() if units]
    if not best:
        return [], "no image excites these filters"
    batch = read_excited(network, best)
    try:
        projections = project(network.backbone.network, layer.position, batch.pixels, best, "deconv")
    except UsageError as error:
        display.warn(f"no projections: {error.found}")
        return [], error.found
    tiles: list[Tile] = []
    for number, (one, projection) in enumerate(zip(best, projections, strict=True)):
        patch = fit_square(crop(batch.picture(number), one.box), _SIDE)
        drawn = fit_square(draw_projected(projection, one), _SIDE)
        tiles += [Tile(drawn, (_name(one, filters),)), Tile(patch, (Path(one.image.path).name,))]
    return tiles, ""


def _name(one: Excited, filters: Filters) -> str:
    number = one.unit.channel
    assert number is not None
    return f"{number}, norm {float(filters.strengths[number]):.3g}"


def _lay_out_projections(name: str, tiles: Sequence[Tile]) -> Grid:
    rows = [tiles[start : start + 6] for start in range(0, len(tiles), 6)]
    note = "The filters of the largest norms: what excites each most, projected to pixels, beside the patch."
    return Grid(f"projections of filters of {name}", rows, notes=[note], side=_SIDE)
