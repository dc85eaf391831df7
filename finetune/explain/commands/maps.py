"""``finetune explain maps``: the feature maps of an image, by strength and by contribution to a class score.

::

    maps-N.png      image N and its feature maps: the strongest at the left, those that contribute most at the
                    right
    maps.csv        strength and contribution of every map of every image, with its rank in both orders
    maps.npz        ``paths`` (N,), ``maps`` (N, C, h, w) float32 of the images that are drawn
    explain.json    model, layer, classes, agreement of the two orders, versions

Shape legend: N images, C feature maps, h w positions of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from finetune.explain.commands.images import ImageBatch, ImageReader, find_images
from finetune.explain.commands.layers import find_map_layer
from finetune.explain.commands.model import find_class, name_outputs, open_model
from finetune.explain.commands.record import say_written, write_arrays, write_record
from finetune.explain.feature_maps import compute_feature_maps
from finetune.explain.positions import MapPosition
from finetune.explain.rank_correlation import correlate_ranks
from finetune.features.network import Network
from finetune.plots.sheet import Grid, Tile, write_grid
from finetune.plots.units import blank, draw_map, fit_square
from finetune.recipe import Recipe
from finetune.runs.files import write_csv
from finetune.runs.new_folder import new_folder
from finetune.runs.outcome import translated_errors
from finetune.system.display import Display
from finetune.targets import decide
from pretrained.graph.structures import tensors_in

METHOD = "maps"
MOST_DRAWN = 8
"""Images that are drawn; the table has all."""
_ROWS, _COLUMNS = 4, 4
"""Feature maps on each half of a sheet."""
_SIDE = 104
_BATCH = 8
_CELLS = ("path", "class", "map", "strength", "strength_rank", "contribution", "contribution_rank")
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class ImageMaps:
    """The feature maps of one image.

    Attributes:
        path: the image.
        class_name: the class whose score they contribute to.
        logit: the score.
        values: (C, h, w).
        strengths: (C,), mean magnitude.
        contributions: (C,), in units of the logit.
    """

    path: str
    class_name: str
    logit: float
    values: Floats
    strengths: Floats
    contributions: Floats

    @property
    def agreement(self) -> float:
        """Rank correlation (Spearman) of the two orders, from -1 to 1; 0 if one of them is no order."""
        if np.ptp(self.strengths) == 0 or np.ptp(self.contributions) == 0:
            return 0.0
        return correlate_ranks(self.strengths, self.contributions)


def explain_maps(
    recipe: Recipe,
    images: Sequence[str],
    output: Path,
    layer: str | None,
    class_name: str | None,
    display: Display,
) -> dict[str, Any]:
    """Write the feature maps of some images in two orders.

    Args:
        recipe: names the model, and the ``--data``; settings of input and machine.
        images: paths of images; see :func:`finetune.explain.commands.images.find_images`.
        output: a new folder.
        layer: one layer; None for the last stage that is a feature map.
        class_name: the class whose score is meant; None for the predicted class of each image.
        display: shows progress.

    Returns:
        The content of ``explain.json``, and the path of the output.

    Raises:
        FinetuneError: the command fails; the subclass gives the exit code (docs/errors.md).
    """
    with translated_errors():
        network = open_model(recipe, display)
        classes = name_outputs(network)
        wanted = None if class_name is None else find_class(classes, class_name)
        name, position = find_map_layer(network, layer)
        found = find_images(recipe, images, output, display)
        with new_folder(output) as folder:
            reader, rows = ImageReader(network), list[tuple[object, ...]]()
            drawn, agreements = list[ImageMaps](), list[float]()
            with display.track("computing feature maps", len(found)) as advance:
                for batch in reader.read(found, _BATCH):
                    for index, maps in enumerate(_compute(network, position, batch, classes, wanted)):
                        rows += _list_rows(maps)
                        agreements.append(maps.agreement)
                        if len(drawn) < MOST_DRAWN:
                            drawn.append(maps)
                            grid = _lay_out(name, maps, batch.picture(index))
                            write_grid(folder / f"{METHOD}-{len(drawn)}.png", grid)
                    advance(len(batch.images), "")
            reader.report_bad(folder, len(found), display)
            write_csv(folder / "maps.csv", rows, _CELLS)
            paths, values = np.array([maps.path for maps in drawn]), np.stack([maps.values for maps in drawn])
            write_arrays(folder / "maps.npz", paths=paths, maps=values)
            facts = {
                "layer": name,
                "num_maps": values.shape[1],
                "map_size": list(values.shape[2:]),
                "class": None if wanted is None else classes[wanted],
                "num_images": len(agreements),
                "num_bad": len(reader.bad),
                "agreement": float(np.mean(agreements)),
            }
            record = write_record(folder, METHOD, network, facts)
        return say_written(output, record, display)


def _compute(
    network: Network, position: MapPosition, batch: ImageBatch, classes: Sequence[str], wanted: int | None
) -> list[ImageMaps]:
    model = network.backbone.network
    with torch.inference_mode():
        logits = tensors_in(model(batch.pixels))[0].float().cpu()
    indices = decide(logits).tolist() if wanted is None else [wanted] * len(logits)
    found = compute_feature_maps(model, position, batch.pixels, indices)
    return [
        ImageMaps(
            image.path,
            classes[index],
            float(logits[number, index]),
            found.values[number].numpy(),
            found.strengths[number].numpy(),
            found.contributions[number].numpy(),
        )
        for number, (image, index) in enumerate(zip(batch.images, indices, strict=True))
    ]


def _order(values: Floats) -> list[int]:
    """Return the maps, the largest value first; of equal ones the lower number."""
    return [int(index) for index in np.argsort(-values, kind="stable")]


def _list_rows(maps: ImageMaps) -> list[tuple[object, ...]]:
    ranks = [
        dict(zip(_order(values), range(1, len(values) + 1), strict=True))
        for values in (maps.strengths, maps.contributions)
    ]
    return [
        (
            maps.path,
            maps.class_name,
            number,
            float(maps.strengths[number]),
            ranks[0][number],
            float(maps.contributions[number]),
            ranks[1][number],
        )
        for number in range(len(maps.strengths))
    ]


def _lay_out(layer: str, maps: ImageMaps, seen: Image.Image) -> Grid:
    strongest, largest = _order(maps.strengths), _order(maps.contributions)
    left = [_draw(maps, number, f"strength {maps.strengths[number]:.3g}") for number in strongest]
    right = [_draw(maps, number, f"adds {maps.contributions[number]:+.3g}") for number in largest]
    image, nothing = Tile(fit_square(seen, _SIDE), (Path(maps.path).name,)), Tile(blank(_SIDE), ())
    rows = [
        [nothing if start else image, *left[start : start + _COLUMNS], *right[start : start + _COLUMNS]]
        for start in range(0, min(_ROWS * _COLUMNS, len(left)), _COLUMNS)
    ]
    headings = ["network input", "strongest first", *[""] * (_COLUMNS - 1), "for the class"]
    notes = [
        f"Left: the strongest of {len(left)} feature maps of {layer}, by mean magnitude. Right: those that "
        f"add most to the score of {maps.class_name} (logit {maps.logit:.2f}), by activation times gradient. "
        f"The two orders of all maps have the rank correlation {maps.agreement:.2f}.",
    ]
    return Grid(f"feature maps of {layer}, {maps.class_name}", rows, headings, notes, _SIDE)


def _draw(maps: ImageMaps, number: int, said: str) -> Tile:
    return Tile(draw_map(maps.values[number], _SIDE), (f"map {number}", said))
