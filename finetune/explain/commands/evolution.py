"""``finetune explain evolution``: what excites a feature map after some epochs of its training.

::

    evolution.png    for each of some feature maps, epoch by epoch: the projection of the unit that is excited
                     most, and the patch that it sees
    evolution.csv    image, activation, unit and box, by feature map and epoch
    explain.json     model, layer, epochs, versions

As in Zeiler and Fergus' figure (arXiv:1311.2901), the image is the one that excites the map most by then.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from finetune.errors import DataError, UsageError
from finetune.explain.commands.layers import find_map_layer
from finetune.explain.commands.model import open_model
from finetune.explain.commands.projections import draw_projected, project
from finetune.explain.commands.record import say_written, write_record
from finetune.explain.commands.strongest import (
    Excited,
    Pictures,
    StrongLayer,
    find_strongest,
    open_pictures,
    read_excited,
)
from finetune.explain.commands.top import list_excited
from finetune.features.network import Network
from finetune.plots.sheet import Grid, Tile, write_grid
from finetune.plots.units import crop, fit_square
from finetune.recipe import Recipe
from finetune.runs.files import damaged_file, write_csv
from finetune.runs.folder import RunFolder
from finetune.runs.new_folder import new_folder
from finetune.runs.outcome import translated_errors
from finetune.runs.reader import RunReader
from finetune.system.display import Display

METHOD = "evolution"
MOST_MAPS = 4
"""Feature maps that are drawn unless the user names others."""
RESULT = "the result"
"""Name of the network of the best epoch, which the run exported."""
_SIDE = 112
_COLUMNS = ("time", "map", "path", "activation", "row", "column", "top", "left", "bottom", "right")


@dataclass(frozen=True)
class Moment:
    """Some feature maps at one time of the training.

    Attributes:
        name: ``epoch 5``, or :data:`RESULT`.
        best: the unit and the image that excite each feature map most; none if no image does.
        patches: the pixels that this unit sees, by feature map.
        projections: what excited it, projected to pixels, by feature map.
    """

    name: str
    best: Mapping[int, Sequence[Excited]]
    patches: Mapping[int, Image.Image]
    projections: Mapping[int, Image.Image]


def explain_evolution(
    recipe: Recipe,
    images: Sequence[str],
    output: Path,
    layer: str | None,
    maps: Sequence[int] | None,
    display: Display,
) -> dict[str, Any]:
    """Write what excited feature maps after some epochs of a run.

    Args:
        recipe: names the run, and the ``--data``; settings of input and machine.
        images: paths of images; without any, and without ``--data``, the images of the run.
        output: a new folder.
        layer: one layer; None for the last stage that is a feature map.
        maps: numbers of the feature maps; None for those that are strongest at the end.
        display: shows progress.

    Returns:
        The content of ``explain.json``, and the path of the output.

    Raises:
        FinetuneError: the command fails; the subclass gives the exit code (docs/errors.md).
    """
    with translated_errors():
        epochs = _find_epochs(Path(recipe.backbone.name or ""))
        network = open_model(recipe, display)
        name, position = find_map_layer(network, layer)
        pictures = open_pictures(_with_data(recipe, images), network, images, output, display)
        network = pictures.network
        with new_folder(output) as folder:
            [last] = find_strongest(pictures, {name: position}, folder, display)
            shown = last.choose(maps, MOST_MAPS)
            moments, reason = list[Moment](), ""
            for number, path in epochs.items():
                display.say(f"epoch {number}")
                earlier = _at_epoch(pictures, path)
                [strong] = find_strongest(earlier, {name: position}, folder, display)
                moment, reason = _look(f"epoch {number}", earlier.network, strong, shown)
                moments.append(moment)
            moments.append(_look(RESULT, network, last, shown)[0])
            _write_table(moments, folder)
            write_grid(folder / "evolution.png", _lay_out(network, last.name, shown, moments, reason))
            facts = {
                "layer": last.name,
                "maps": shown,
                "epochs": list(epochs),
                "num_images": len(last.images),
                "num_bad": pictures.num_asked - len(last.images),
                "no_projections": reason or None,
            }
            record = write_record(folder, METHOD, network, facts)
        return say_written(output, record, display)


def _find_epochs(folder: Path) -> dict[int, Path]:
    """Return the files with the weights of a run, by epoch.

    Raises:
        UsageError: the model is no run, or the run kept no weights.
    """
    run = RunFolder(folder)
    if not (run.recipe.is_file() and run.split.is_file()):
        fix = "Name the --output of a `finetune run`."
        raise UsageError(f"the model {folder}", "it is not a run folder, so it has no epochs", fix)
    epochs = RunReader(run).kept_epochs
    if not epochs:
        found = "it kept the weights of no epoch"
        fix = "Train again, with another --output and --set training.keep_epochs=[1,2,5,10]."
        raise UsageError(f"the run {folder}", found, fix)
    return epochs


def _with_data(recipe: Recipe, images: Sequence[str]) -> Recipe:
    """Return the recipe with the images of the run as data, unless others were named."""
    if images or recipe.data.path:
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": recipe.backbone.name})})


def _at_epoch(pictures: Pictures, path: Path) -> Pictures:
    """Return the same images, seen by a copy of the run's network with its weights after an epoch.

    Raises:
        DataError: the file is damaged, or its tensors are not those of the network.
    """
    model = copy.deepcopy(pictures.network.backbone.network)
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise damaged_file(path, error) from None
    _check_fits(model, tensors, path)
    model.load_state_dict(tensors, strict=False)  # frozen tensors are those of the result
    network = replace(pictures.network, backbone=replace(pictures.network.backbone, network=model))
    source = None if pictures.source is None else replace(pictures.source, network=network)
    return replace(pictures, network=network, source=source)


def _check_fits(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    wrong = [name for name in tensors if name not in own or own[name].shape != tensors[name].shape]
    if wrong:
        fix = "Name the run as it was written, with the files of its own epochs."
        raise DataError(str(path), f"its tensor {wrong[0][:100]} is not one of the run's network", fix)


def _look(name: str, network: Network, layer: StrongLayer, maps: Sequence[int]) -> tuple[Moment, str]:
    """Return what excites some feature maps most, and why there are no projections."""
    best = {number: units[:1] for number, units in layer.find_excited(network, maps).items()}
    excited = [one for units in best.values() for one in units]
    if not excited:
        return Moment(name, best, {}, {}), ""
    batch = read_excited(network, excited)
    patches = {_channel(one): crop(batch.picture(index), one.box) for index, one in enumerate(excited)}
    try:
        values = project(network.backbone.network, layer.position, batch.pixels, excited, "deconv")
    except UsageError as error:
        return Moment(name, best, patches, {}), error.found
    drawn = {_channel(one): draw_projected(found, one) for one, found in zip(excited, values, strict=True)}
    return Moment(name, best, patches, drawn), ""


def _channel(one: Excited) -> int:
    assert one.unit.channel is not None
    return one.unit.channel


def _write_table(moments: Sequence[Moment], folder: Path) -> None:
    rows = []
    for moment in moments:
        for _, number, _, *cells in list_excited("", moment.best):
            rows.append((moment.name, number, *cells))
    write_csv(folder / "evolution.csv", rows, _COLUMNS)


def _lay_out(
    network: Network, layer: str, maps: Sequence[int], moments: Sequence[Moment], reason: str
) -> Grid:
    rows = []
    for number in maps:
        if not reason:
            rows.append([_draw(moment, number, moment.projections) for moment in moments])
        rows.append([_draw(moment, number, moment.patches) for moment in moments])
    notes = [
        "For each feature map, the unit and the image that excite it most at that time: "
        + ("the patch that the unit sees." if reason else "its projection, and below the patch that it sees.")
    ]
    if reason:
        notes.append(f"There are no projections: {reason}.")
    headings = [moment.name for moment in moments]
    return Grid(f"{layer} of {network.backbone.card.name} in training", rows, headings, notes, _SIDE)


def _draw(moment: Moment, number: int, pictures: Mapping[int, Image.Image]) -> Tile:
    if number not in pictures:
        return Tile("nothing excites it", (f"map {number}",))
    [one] = moment.best[number]
    return Tile(
        fit_square(pictures[number], _SIDE),
        (f"map {number}: {one.activation:.4g}", Path(one.image.path).name),
    )
