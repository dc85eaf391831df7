"""``finetune explain deconv``: what in an image excited a feature map, projected back to pixels.

::

    deconv.png      for each feature map the projections of the nine best images, beside their patches
    deconv.csv      image, activation, unit and the box of its patch
    deconv.npz      ``maps`` (M,), ``projections`` (M, 9, 3, H, W) float32 over the whole image; zero where
                    there are fewer images
    explain.json    model, layer, method, checks, versions

Shape legend: M feature maps that are drawn, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune.errors import UsageError, suggest
from finetune.explain.commands.layers import find_map_layer
from finetune.explain.commands.model import open_model
from finetune.explain.commands.projections import Floats, draw_projected, measure_randomisation, project
from finetune.explain.commands.record import say_written, write_arrays, write_record
from finetune.explain.commands.strongest import (
    NUM_TOP,
    Excited,
    StrongLayer,
    describe_layers,
    find_strongest,
    open_pictures,
    read_excited,
)
from finetune.explain.commands.top import COLUMNS, list_excited
from finetune.explain.deconv import check_projectable
from finetune.explain.relu_rules import Rule
from finetune.features.network import Network
from finetune.plots.sheet import Grid, Tile, write_grid
from finetune.plots.units import crop, draw_mosaic
from finetune.recipe import Recipe
from finetune.runs.files import write_csv
from finetune.runs.new_folder import new_folder
from finetune.runs.outcome import translated_errors
from finetune.system.display import Display

METHODS: tuple[Rule, ...] = ("deconv", "guided")
MOST_MAPS = 8
"""Feature maps that are drawn unless the user names others."""
_SIDE = 270
"""Width and height of a mosaic of nine in pixels."""


def explain_deconv(
    recipe: Recipe,
    images: Sequence[str],
    output: Path,
    layer: str | None,
    maps: Sequence[int] | None,
    method: str,
    display: Display,
) -> dict[str, Any]:
    """Write the projections of the strongest units of feature maps.

    Args:
        recipe: names the model, and the ``--data``; settings of input and machine.
        images: paths of images; see :func:`finetune.explain.commands.images.find_images`.
        output: a new folder.
        layer: one layer; None for the last stage that is a feature map.
        maps: numbers of the feature maps; None for the strongest.
        method: ``deconv`` or ``guided``.
        display: shows progress.

    Returns:
        The content of ``explain.json``, and the path of the output.

    Raises:
        FinetuneError: the command fails; the subclass gives the exit code (docs/errors.md).
    """
    with translated_errors():
        rule = _find_rule(method)
        network = open_model(recipe, display)
        name, position = find_map_layer(network, layer)
        size = network.backbone.card.preprocessing.input_size
        check_projectable(network.backbone.network, position, size, rule)
        pictures = open_pictures(recipe, network, images, output, display)
        network = pictures.network
        with new_folder(output) as folder:
            [strong] = find_strongest(pictures, {name: position}, folder, display)
            shown = strong.choose(maps, MOST_MAPS)
            excited = strong.find_excited(network, shown)
            with display.track("projecting", len(shown)) as advance:
                tiles, projections = list[list[Tile]](), list[Floats]()
                for number, units in excited.items():
                    projected = _project(network, strong, units, rule)
                    projections.append(projected)
                    tiles.append(_draw(network, number, units, projected))
                    advance(1, "")
            checks = {"randomisation": _check(network, strong, excited, projections, rule)}
            write_csv(folder / "deconv.csv", list_excited(strong.name, excited), COLUMNS)
            _write_projections(shown, projections, folder)
            write_grid(folder / "deconv.png", _lay_out(network, strong, tiles, rule, checks))
            facts = {
                "layers": describe_layers([strong], {strong.name: shown}),
                "num_images": len(strong.images),
                "num_bad": pictures.num_asked - len(strong.images),
                "checks": checks,
            }
            record = write_record(folder, rule, network, facts)
        return say_written(output, record, display)


def _find_rule(method: str) -> Rule:
    for rule in METHODS:
        if rule == method:
            return rule
    found = f"there is no such method{suggest(method, METHODS)}"
    raise UsageError(f"--method {method}", found, f"Take {' or '.join(METHODS)}.")


def _project(network: Network, layer: StrongLayer, excited: Sequence[Excited], rule: Rule) -> Floats:
    """Return the projections (9, 3, H, W) of the units of one feature map; zero where there are fewer."""
    found = np.zeros((NUM_TOP, *network.backbone.card.preprocessing.input_size), np.float32)
    if excited:
        pixels = read_excited(network, excited).pixels
        found[: len(excited)] = project(network.backbone.network, layer.position, pixels, excited, rule)
    return found


def _check(
    network: Network,
    layer: StrongLayer,
    excited: Mapping[int, Sequence[Excited]],
    projections: Sequence[Floats],
    rule: Rule,
) -> dict[str, Any]:
    """Return how much the best projection of each feature map depends on the weights."""
    best = [(units[0], found[0]) for units, found in zip(excited.values(), projections, strict=True) if units]
    units, found = [unit for unit, _ in best], [projection for _, projection in best]
    return measure_randomisation(network, layer.position, units, found, rule)


def _draw(network: Network, number: int, excited: Sequence[Excited], projections: Floats) -> list[Tile]:
    if not excited:
        return [Tile("no image excites this map", (f"map {number}",)), Tile("", ())]
    batch = read_excited(network, excited)
    projected = [draw_projected(projections[index], one) for index, one in enumerate(excited)]
    patches = [crop(batch.picture(index), one.box) for index, one in enumerate(excited)]
    strongest = f"activation {excited[0].activation:.4g} to {excited[-1].activation:.4g}"
    return [
        Tile(draw_mosaic(projected, _SIDE), (f"map {number}: projections", strongest)),
        Tile(draw_mosaic(patches, _SIDE), ("patches", _name_box(excited))),
    ]


def _name_box(excited: Sequence[Excited]) -> str:
    heights, widths = zip(*(one.box.size for one in excited), strict=True)
    return f"up to {max(heights)} x {max(widths)} pixels"


def _lay_out(
    network: Network,
    layer: StrongLayer,
    tiles: Sequence[Sequence[Tile]],
    rule: Rule,
    checks: Mapping[str, Any],
) -> Grid:
    pairs = [
        [tile for pair in tiles[start : start + 2] for tile in pair] for start in range(0, len(tiles), 2)
    ]
    name = "deconvnet" if rule == "deconv" else "guided backpropagation"
    title = f"{name}, {layer.name} of {network.backbone.card.name}: what excited its feature maps"
    notes = [
        f"Projections of the strongest unit in the nine best of {len(layer.images)} images, the best at the "
        "top left; grey is zero.",
        checks["randomisation"]["said"],
    ]
    return Grid(title, pairs, notes=notes, side=_SIDE)


def _write_projections(maps: Sequence[int], projections: Sequence[Floats], folder: Path) -> None:
    stacked = np.stack(projections) if projections else np.zeros((0, NUM_TOP, 3, 0, 0), np.float32)
    write_arrays(folder / "deconv.npz", maps=np.array(maps, np.int64), projections=stacked)
