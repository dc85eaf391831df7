"""``finetune explain receptive-field``: what the units of each layer can see, and what they make use of.

::

    receptive-fields.png    where the gradient of the unit in the middle is, with the exact field as a frame
    receptive-fields.csv    size, step and centre of the field of every layer, and effective sizes
    receptive-fields.npz    ``layers`` (L,), ``mass`` (L, H, W) float32: share of each pixel in it
    explain.json            model, images, versions
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.data.inputs import InputImage
from finetune.errors import UsageError
from finetune.explain.commands.images import ImageReader, find_images
from finetune.explain.commands.layers import find_all, find_map_layers
from finetune.explain.commands.model import open_model
from finetune.explain.commands.record import say_written, write_arrays, write_record
from finetune.explain.effective_field import find_effective_size, measure_gradient_mass
from finetune.explain.positions import MapPosition
from finetune.explain.receptive_field import ReceptiveField, measure_fields
from finetune.features.network import Network
from finetune.plots.overlay import colour_heat
from finetune.plots.sheet import Grid, Tile, write_grid
from finetune.plots.units import frame
from finetune.recipe import Recipe
from finetune.runs.files import write_csv
from finetune.runs.new_folder import new_folder
from finetune.runs.outcome import translated_errors
from finetune.system.display import Display

METHOD = "receptive-field"
MOST_DRAWN = 12
"""Layers whose gradient is measured and drawn; the exact fields of all are in the table."""
MOST_IMAGES = 32
"""Images over which gradients are averaged; more hardly change the mean."""
_BATCH = 4
_SHARES = (0.5, 0.95)
_COLUMNS = (
    "layer",
    "map_height",
    "map_width",
    "field_height",
    "field_width",
    "step_down",
    "step_right",
    "first_centre_y",
    "first_centre_x",
    "top",
    "left",
    "bottom",
    "right",
    "effective_50",
    "effective_95",
)


def explain_receptive_field(
    recipe: Recipe, images: Sequence[str], output: Path, layer: str | None, display: Display
) -> dict[str, Any]:
    """Write the receptive fields of a network's layers.

    Args:
        recipe: names the model, and the ``--data``; settings of input and machine.
        images: images over which gradients are averaged; without any, random ones are made.
        output: a new folder.
        layer: layers, separated by commas; None for all convolutions, poolings and stages.
        display: shows progress.

    Returns:
        The content of ``explain.json``, and the path of the output.

    Raises:
        FinetuneError: the command fails; the subclass gives the exit code (docs/errors.md).
    """
    with translated_errors():
        network = open_model(recipe, display)
        positions, drawn = _choose(network, layer)
        found = find_images(recipe, images, output, display) if images or recipe.data.path else ()
        with new_folder(output) as folder:
            with display.busy("measuring receptive fields"):
                size = network.backbone.card.preprocessing.input_size
                listed = measure_fields(network.backbone.network, list(positions.values()), size)
            fields = dict(zip(positions, listed, strict=True))
            masses = _measure_masses(
                network, {name: positions[name] for name in drawn}, found, folder, display
            )
            _write(network, fields, masses, bool(found), folder)
            facts = {
                "layers": list(fields),
                "num_images": min(len(found), MOST_IMAGES),
                "images": "given" if found else "random",
            }
            record = write_record(folder, METHOD, network, facts)
        return say_written(output, record, display)


def _choose(network: Network, layer: str | None) -> tuple[dict[str, MapPosition], list[str]]:
    """Return the layers by name, and the names of those that are drawn.

    Raises:
        UsageError: no layer of the network is a feature map.
    """
    if layer is not None:
        named = find_map_layers(network, layer)
        return named, list(named)[:MOST_DRAWN]
    found, stages = find_all(network)
    if not found:
        asked = f"receptive fields of {network.backbone.card.name}"
        fix = "Name larger images (--img-size), or another model."
        raise UsageError(asked, "none of its layers is a feature map", fix)
    return found, (stages or list(found))[:MOST_DRAWN]


def _measure_masses(
    network: Network,
    positions: Mapping[str, MapPosition],
    images: Sequence[InputImage],
    folder: Path,
    display: Display,
) -> dict[str, Tensor]:
    """Return the shares of the pixels (H, W) in the gradient of each layer."""
    reader, chosen = ImageReader(network), images[:MOST_IMAGES]
    size = network.backbone.card.preprocessing.input_size
    noise = torch.randn(2 * _BATCH, *size, generator=torch.Generator().manual_seed(0))
    device = network.placement.device
    batches = (
        (batch.pixels for batch in reader.read(chosen, _BATCH))
        if chosen
        else (part.to(device) for part in torch.split(noise, _BATCH))
    )
    total, done = [torch.zeros(size[1:], dtype=torch.float64) for _ in positions], 0
    with display.track("measuring gradients", len(chosen) or len(noise)) as advance:
        for number, pixels in enumerate(batches):
            parts = measure_gradient_mass(
                network.backbone.network, list(positions.values()), pixels, seed=number
            )
            total = [mass + len(pixels) * part for mass, part in zip(total, parts, strict=True)]
            done += len(pixels)
            advance(len(pixels), "")
    reader.report_bad(folder, len(chosen), display)
    return {name: mass / done for name, mass in zip(positions, total, strict=True)}


def _write(
    network: Network,
    fields: Mapping[str, ReceptiveField],
    masses: Mapping[str, Tensor],
    has_images: bool,
    folder: Path,
) -> None:
    sizes = {
        name: tuple(find_effective_size(mass, _centre_of(fields[name]), share) for share in _SHARES)
        for name, mass in masses.items()
    }
    rows = [(name, *_cells(field), *sizes.get(name, ("", ""))) for name, field in fields.items()]
    write_csv(folder / "receptive-fields.csv", rows, _COLUMNS)
    stacked = np.stack([mass.float().numpy() for mass in masses.values()])
    write_arrays(folder / "receptive-fields.npz", layers=np.array(list(masses)), mass=stacked)
    tiles = [_draw(name, fields[name], mass, sizes[name]) for name, mass in masses.items()]
    images = "the images that were given" if has_images else "random images"
    grid = Grid(
        f"receptive fields, {network.backbone.card.name}",
        [tiles[start : start + 4] for start in range(0, len(tiles), 4)],
        notes=[
            "Frame: the pixels that the unit in the middle of the map can see, exactly. Bright: where its "
            f"gradient is, averaged over {images}; the square root is drawn.",
        ],
    )
    write_grid(folder / "receptive-fields.png", grid)


def _cells(field: ReceptiveField) -> tuple[object, ...]:
    """Return the cells of the table; those of a field that is no window of one size are empty."""
    window = (*(field.size or ("", "")), *(field.stride or ("", "")), *(field.first_centre or ("", "")))
    return (*field.map_size, *window, *field.box)


def _centre_of(field: ReceptiveField) -> tuple[float, float]:
    """Return the centre of the field of the unit in the middle, also if the border cuts it off."""
    if field.first_centre is None or field.stride is None:
        top, left, bottom, right = field.box
        return (top + bottom) / 2, (left + right) / 2
    places = [size // 2 for size in field.map_size]
    first, step = field.first_centre, field.stride
    return first[0] + places[0] * step[0], first[1] + places[1] * step[1]


def _draw(name: str, field: ReceptiveField, mass: Tensor, sizes: Sequence[int]) -> Tile:
    shares = (mass / max(float(mass.max()), 1e-30)).sqrt().float().numpy()
    picture = frame(colour_heat(shares), field.box, Grid.side)
    sees = ["each sees the whole image"]
    if field.size is not None and field.stride is not None:
        sees = [f"sees {_times(field.size)}", f"in steps of {_times(field.stride)}"]
    elif field.box.size != tuple(mass.shape):
        sees = [f"sees {_times(field.box.size)}", "in fixed windows"]
    half, most = sizes
    return Tile(picture, (name, *sees, f"half of gradient in {half}", f"95 % in {most} pixels"))


def _times(pair: Sequence[int]) -> str:
    return f"{pair[0]} x {pair[1]}"
