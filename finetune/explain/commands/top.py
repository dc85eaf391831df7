"""``finetune explain top``: the images that excite feature maps most, and what their units see of them.

::

    top-LAYER.png    for each of some feature maps of a layer the nine best images and patches
    top.csv          the same as numbers: image, activation, unit and the box of its patch
    top.npz          of every map of every layer: ``LAYER.values`` and ``LAYER.images``, each (9, C), the
                     strongest first; ``paths`` (N,), which the images are indices into
    explain.json     model, layers, number of images, versions

Shape legend: N images that could be read, C feature maps of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune.explain.commands.layers import find_map_layers
from finetune.explain.commands.model import open_model
from finetune.explain.commands.record import say_written, write_arrays, write_record
from finetune.explain.commands.strongest import (
    Excited,
    StrongLayer,
    describe_layers,
    find_strongest,
    open_pictures,
    read_excited,
)
from finetune.features.network import Network
from finetune.plots.sheet import Grid, Tile, write_grid
from finetune.plots.units import crop, fit_square, frame
from finetune.recipe import Recipe
from finetune.runs.files import write_csv
from finetune.runs.new_folder import new_folder
from finetune.runs.outcome import translated_errors
from finetune.system.display import Display

METHOD = "top"
MOST_MAPS = 6
"""Feature maps of a layer that are drawn unless the user names others; the npz file has all."""
_SIDE = 112
"""Width and height of a tile in pixels."""
COLUMNS = ("layer", "map", "rank", "path", "activation", "row", "column", "top", "left", "bottom", "right")


def explain_top(
    recipe: Recipe,
    images: Sequence[str],
    output: Path,
    layer: str | None,
    maps: Sequence[int] | None,
    display: Display,
) -> dict[str, Any]:
    """Write the images that excite feature maps most; one pass over the images serves all maps and layers.

    Args:
        recipe: names the model, and the ``--data``; settings of input and machine.
        images: paths of images; see :func:`finetune.explain.commands.images.find_images`.
        output: a new folder.
        layer: layers, separated by commas; None for all stages.
        maps: numbers of the feature maps that are drawn; None for the strongest.
        display: shows progress.

    Returns:
        The content of ``explain.json``, and the path of the output.

    Raises:
        FinetuneError: the command fails; the subclass gives the exit code (docs/errors.md).
    """
    with translated_errors():
        network = open_model(recipe, display)
        positions = find_map_layers(network, layer or "all")
        pictures = open_pictures(recipe, network, images, output, display)
        network = pictures.network
        with new_folder(output) as folder:
            layers = find_strongest(pictures, positions, folder, display)
            shown = {strong.name: strong.choose(maps, MOST_MAPS) for strong in layers}
            rows = list[tuple[object, ...]]()
            for strong in layers:
                with display.busy(f"drawing {strong.name}"):
                    excited = strong.find_excited(network, shown[strong.name])
                    _draw(network, strong, excited, folder)
                rows += list_excited(strong.name, excited)
            write_csv(folder / "top.csv", rows, COLUMNS)
            _write_arrays(layers, folder)
            num_images = len(layers[0].images)
            facts = {
                "layers": describe_layers(layers, shown),
                "num_images": num_images,
                "num_bad": pictures.num_asked - num_images,
            }
            record = write_record(folder, METHOD, network, facts)
        return say_written(output, record, display)


def list_excited(layer: str, excited: Mapping[int, Sequence[Excited]]) -> list[tuple[object, ...]]:
    """Return the rows of the table (:data:`COLUMNS`); rank 1 is the strongest image."""
    return [
        (layer, number, rank, one.image.path, one.activation, one.unit.row, one.unit.column, *one.box)
        for number, units in excited.items()
        for rank, one in enumerate(units, 1)
    ]


def _draw(
    network: Network, layer: StrongLayer, excited: Mapping[int, Sequence[Excited]], folder: Path
) -> None:
    rows = [row for number, units in excited.items() for row in _draw_map(network, number, units)]
    silent = f", {layer.num_silent} of them silent" if layer.num_silent else ""
    title = f"{layer.name} of {network.backbone.card.name}: {layer.num_maps} feature maps{silent}"
    notes = [
        f"The images, of {len(layer.images)}, in which a unit of the map is most active, the best at the "
        "left. Frame and patch: the pixels that this unit can see.",
    ]
    write_grid(folder / f"{METHOD}-{layer.name}.png", Grid(title, rows, notes=notes, side=_SIDE))


def _draw_map(network: Network, number: int, units: Sequence[Excited]) -> list[list[Tile]]:
    """Return a row of images, and one of patches unless each unit sees the whole image."""
    if not units:
        return [[Tile("no image excites this map", (f"map {number}",))]]
    batch = read_excited(network, units)
    pictures = [batch.picture(index) for index in range(len(units))]
    said = [(f"map {number}: {one.activation:.4g}", Path(one.image.path).name) for one in units]
    framed = [
        Tile(frame(picture, one.box, _SIDE), lines)
        for picture, one, lines in zip(pictures, units, said, strict=True)
    ]
    if all(
        one.box.size == (picture.height, picture.width) for picture, one in zip(pictures, units, strict=True)
    ):
        return [framed]
    patches = [
        Tile(fit_square(crop(picture, one.box), _SIDE), ("{} x {} pixels".format(*one.box.size),))
        for picture, one in zip(pictures, units, strict=True)
    ]
    return [framed, patches]


def _write_arrays(layers: Sequence[StrongLayer], folder: Path) -> None:
    arrays = {"paths": np.array([image.path for image in layers[0].images])}
    for layer in layers:
        arrays |= {
            f"{layer.name}.values": layer.top.values.numpy(),
            f"{layer.name}.images": layer.top.images.numpy(),
        }
    write_arrays(folder / "top.npz", **arrays)
