"""``finetune explain localise``: a box around the object of each image, from its saliency map.

::

    boxes.png      what the network sees, with the box found (red) and those given (green)
    boxes.csv      path, class, probability, x0, y0, x1, y1 in pixels of the image, iou, why there is no box
    explain.json   method, model, class, checks, share of the boxes with an overlap over 0.5, versions

Shape legend: H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.errors import DataError
from finetune.evaluation.intervals import compute_wilson
from finetune.evaluation.view_geometry import Box, ViewGeometry, find_geometry
from finetune.explain.attribution.localise import compute_iou, find_box, has_grabcut
from finetune.explain.checks.verdicts import Check
from finetune.explain.commands.checked_maps import CheckedMaps, MapJob, MapRow
from finetune.explain.commands.heat_maps import MOST_DRAWN, describe, say_checks, shrink
from finetune.explain.commands.images import ImageBatch, ImageReader, find_images
from finetune.explain.commands.model import find_class, name_outputs, open_model
from finetune.explain.commands.record import say_written, write_record
from finetune.explain.commands.saliency import make_saliency
from finetune.plots.boxes import FOUND, TRUE, draw_boxes
from finetune.plots.sheet import Grid, Tile, write_grid
from finetune.recipe import Recipe
from finetune.runs.files import read_rows, write_csv
from finetune.runs.new_folder import new_folder
from finetune.runs.outcome import translated_errors
from finetune.system.display import Display

LEAST_IOU = 0.5
"""A box counts as right if its overlap with one of the given boxes is larger, as in ImageNet's challenge."""
BOX_COLUMNS = ("path", "x0", "y0", "x1", "y1")
_COLUMNS = ("path", "class", "probability", "x0", "y0", "x1", "y1", "iou", "no_box")
_WIDTH = 6
"""Images side by side on the sheet."""
NOT_SALIENT = "no pixel stands out"


def explain_localise(
    recipe: Recipe,
    images: Sequence[str],
    output: Path,
    class_name: str | None,
    boxes: Path | None,
    display: Display,
) -> dict[str, Any]:
    """Write a box around the object of each image.

    Args:
        recipe: names the model, and the ``--data``; settings of input and machine.
        images: paths of images; see :func:`finetune.explain.commands.images.find_images`.
        output: a new folder.
        class_name: the class that is looked for; None for the predicted class of each image.
        boxes: a CSV file with true boxes (path, x0, y0, x1, y1 in pixels of the upright image); a path may
            have several. None if they are not known.
        display: shows progress.

    Returns:
        The content of ``explain.json``, and the path of the output.

    Raises:
        FinetuneError: the command fails; the subclass gives the exit code (docs/errors.md).
    """
    with translated_errors():
        truth = _read_boxes(boxes) if boxes is not None else {}
        network = open_model(recipe, display)
        classes = name_outputs(network)
        wanted = None if class_name is None else find_class(classes, class_name)
        method = "grabcut" if has_grabcut() else "threshold"
        job = MapJob("gradient", network, classes, wanted, make_saliency("gradient"), {"boxes": method})
        found = find_images(recipe, images, output, display)
        _check_known(boxes, truth, [image.path for image in found])
        with new_folder(output) as folder:
            reader, maps, located = ImageReader(network), CheckedMaps(job), list[_Located]()
            with display.track("looking for objects", len(found)) as advance:
                for batch, rows in maps.compute(found, reader):
                    located += [_locate(job, batch, number, row) for number, row in enumerate(rows)]
                    advance(len(rows), "")
            reader.report_bad(folder, len(found), display)
            rows, checks = maps.judge()
            say_checks(checks, display)
            results = [_Result(row, one, truth) for row, one in zip(rows, located, strict=True)]
            write_csv(folder / "boxes.csv", [result.cells(classes) for result in results], _COLUMNS)
            write_grid(folder / "boxes.png", _lay_out(job, results, checks))
            facts = describe(job, rows, checks, reader) | _count_right(results, truth, display)
            record = write_record(folder, "localise", network, facts)
        return say_written(output, record, display)


@dataclass(frozen=True)
class _Located:
    """The box in the network's view of an image (None if nothing is salient), and the view for the sheet."""

    box: Box | None
    geometry: ViewGeometry
    seen: Image.Image


@dataclass(frozen=True)
class _Result:
    """What is said of one image."""

    row: MapRow
    located: _Located
    truth: Mapping[str, Sequence[Box]]

    @property
    def reason(self) -> str:
        """Why the image has no box; empty if it has one."""
        return self.row.heat.reason or ("" if self.located.box else NOT_SALIENT)

    @property
    def box(self) -> Box | None:
        """The box in pixels of the image; None if the checks speak against the map."""
        box = None if self.reason else self.located.box
        return None if box is None else self.located.geometry.to_image(box)

    @property
    def given(self) -> Sequence[Box]:
        """The true boxes; empty if they are not known."""
        return self.truth.get(self.row.path, ())

    @property
    def iou(self) -> float | None:
        """The largest overlap with a true box; 0 without a box, and None if no true one is known."""
        if not self.given:
            return None
        return max((compute_iou(self.box, true) for true in self.given), default=0.0) if self.box else 0.0

    def cells(self, classes: Sequence[str]) -> tuple[Any, ...]:
        """Return the row of ``boxes.csv``."""
        corners = self.box or (None, None, None, None)
        row = self.row
        return (row.path, classes[row.index], row.answer, *corners, self.iou, self.reason)

    def draw(self, classes: Sequence[str]) -> Tile:
        """Return the tile of the sheet."""
        geometry, image = self.located.geometry, self.located.seen
        image = draw_boxes(image, [_share(geometry.to_view(box), geometry) for box in self.given], TRUE)
        if self.box and self.located.box:
            image = draw_boxes(image, [_share(self.located.box, geometry)], FOUND)
        said = self.reason and f"no box: {self.reason}"
        said = said or ("" if self.iou is None else f"overlap {self.iou:.2f}")
        return Tile(image, (classes[self.row.index], said or f"probability {self.row.answer:.3f}"))


def _locate(job: MapJob, batch: ImageBatch, number: int, row: MapRow) -> _Located:
    geometry = find_geometry(batch.sizes[number], job.network.backbone.card.preprocessing)
    pixels = np.asarray(batch.picture(number))
    box = None if row.heat.values is None else find_box(row.heat.values.numpy(), pixels)
    return _Located(box, geometry, shrink(batch.picture(number)))


def _share(box: Box, geometry: ViewGeometry) -> Box:
    width, height = geometry.view
    return box[0] / width, box[1] / height, box[2] / width, box[3] / height


def _lay_out(job: MapJob, results: Sequence[_Result], checks: Sequence[Check]) -> Grid:
    tiles = [result.draw(job.classes) for result in results[:MOST_DRAWN]]
    rows = [tiles[start : start + _WIDTH] for start in range(0, len(tiles), _WIDTH)]
    shown = f", {len(tiles)} of {len(results)} images shown" if len(results) > len(tiles) else ""
    title = f"boxes from saliency ({job.facts['boxes']}), {job.network.backbone.card.name}{shown}"
    return Grid(title, rows, notes=[check.said for check in checks])


def _count_right(
    results: Sequence[_Result], truth: Mapping[str, Sequence[Box]], display: Display
) -> dict[str, Any]:
    """Return and show the share of images whose box overlaps a true one by more than half."""
    if not truth:
        return {}
    overlaps = [result.iou for result in results if result.iou is not None]
    right = sum(overlap > LEAST_IOU for overlap in overlaps)
    low, high = compute_wilson(right, len(overlaps))
    display.say(
        f"{right} of {len(overlaps)} boxes overlap a given one by more than half "
        f"({100 * right / len(overlaps):.1f} %, 95 % interval {100 * low:.1f} to {100 * high:.1f} %)"
    )
    share = {"value": right / len(overlaps), "interval": [low, high], "num_images": len(overlaps)}
    return {"share_over_half": share}


def _read_boxes(file: Path) -> dict[str, list[Box]]:
    """Return the true boxes by path.

    Raises:
        DataError: the file cannot be read, lacks a column, or a box is none.
    """
    if not file.is_file():
        raise DataError(f"--boxes {file}", "there is no such file", "Check the path.")
    found: dict[str, list[Box]] = {}
    try:
        rows = read_rows(file, BOX_COLUMNS)
    except OSError as error:
        raise DataError(
            f"--boxes {file}", f"it cannot be read ({error.strerror})", "Make it readable."
        ) from None
    for number, row in enumerate(rows, start=2):
        try:
            x0, y0, x1, y1 = (float(row[column]) for column in BOX_COLUMNS[1:])
        except ValueError:
            x0, y0, x1, y1 = 0.0, 0.0, 0.0, 0.0
        if not (x0 < x1 and y0 < y1):
            fix = "Give x0 < x1 and y0 < y1 in pixels of the upright image."
            raise DataError(f"--boxes {file}", f"line {number} holds no box", fix)
        found.setdefault(row["path"], []).append((x0, y0, x1, y1))
    return found


def _check_known(file: Path | None, truth: Mapping[str, Sequence[Box]], paths: Sequence[str]) -> None:
    """Refuse boxes of which none belongs to an image.

    Raises:
        DataError: there is none.
    """
    if file is not None and not truth.keys() & set(paths):
        found = f"none of its paths is one of the images (they are like {paths[0]})" if paths else "no images"
        raise DataError(f"--boxes {file}", found, "Write the paths as they are in boxes.csv.")
