"""What the commands on heat maps share: checked maps are drawn over the images, and written.

::

    heat-maps.png    the images with their maps, and what the checks found
    heat-maps.csv    path, class, probability (or value), logit, what the check by deletion found, why no map
                     is shown
    heat-maps.npz    ``paths`` (N,), ``classes`` (N,), ``maps`` (N, h, w) float32 from 0 to 1; zero where
                     there is no map
    explain.json     method, model, layer, checks, versions

Shape legend: N images and classes with a map or without, h w positions of the map.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finetune.data.inputs import InputImage
from finetune.explain.checks.verdicts import Check
from finetune.explain.commands.checked_maps import CheckedMaps, MapJob, MapRow
from finetune.explain.commands.images import ImageReader
from finetune.explain.commands.record import write_arrays, write_record
from finetune.plots.overlay import draw_overlay
from finetune.plots.sheet import CELL, Grid, Tile, write_grid
from finetune.runs.files import write_csv
from finetune.system.display import Display

MOST_DRAWN = 24
"""Images on the sheet; the other maps are in the npz file."""
_PAIRS = 3
"""Images side by side on the sheet, each with its map."""
_FINE = 64
"""Least side of a map of pixels, whose few largest values would leave all others dark."""


def write_heat_maps(
    job: MapJob, images: Sequence[InputImage], folder: Path, display: Display
) -> dict[str, Any]:
    """Compute, check and write the heat maps of some images.

    Args:
        job: what is explained.
        images: at least one.
        folder: the folder of the results, as :func:`finetune.runs.new_folder.new_folder` yields it.
        display: shows progress, and what the checks found.

    Returns:
        The content of ``explain.json``.

    Raises:
        DataError: none of the images can be read.
    """
    reader, maps = ImageReader(job.network), CheckedMaps(job)
    seen: list[Image.Image] = []
    with display.track("computing heat maps", len(images)) as advance:
        for batch, rows in maps.compute(images, reader):
            seen += [shrink(batch.picture(row.place)) for row in rows[: MOST_DRAWN - len(seen)]]
            advance(len(batch.images), "")
    reader.report_bad(folder, len(images), display)
    rows, checks = maps.judge()
    say_checks(checks, display)
    _write_tables(job, maps.rows, rows, folder)
    write_grid(folder / "heat-maps.png", _lay_out(job, rows, seen, checks))
    return write_record(folder, job.method, job.network, describe(job, rows, checks, reader))


def shrink(seen: Image.Image) -> Image.Image:
    """Return what the network saw of an image at the size of a tile."""
    scale = CELL / max(seen.size)
    size = round(seen.width * scale), round(seen.height * scale)
    return seen.resize(size, Image.Resampling.LANCZOS)


def say_checks(checks: Sequence[Check], display: Display) -> None:
    """Show what the checks found; failures are warnings."""
    for check in checks:
        (display.warn if check.passed is False else display.say)(check.said)


def describe(
    job: MapJob, rows: Sequence[MapRow], checks: Sequence[Check], reader: ImageReader
) -> dict[str, Any]:
    """Return what ``explain.json`` tells of the maps."""
    return {
        **job.facts,
        "class": None if job.wanted is None else job.classes[job.wanted],
        "num_images": len({row.path for row in rows}),
        "num_bad": len(reader.bad),
        "num_shown": sum(row.heat.values is not None for row in rows),
        "checks": {check.name: check.to_dict() for check in checks},
    }


def _lay_out(
    job: MapJob, rows: Sequence[MapRow], seen: Sequence[Image.Image], checks: Sequence[Check]
) -> Grid:
    pairs = [_draw(job, row, image) for row, image in zip(rows, seen, strict=False)]
    lines = [
        [tile for pair in pairs[start : start + _PAIRS] for tile in pair]
        for start in range(0, len(pairs), _PAIRS)
    ]
    kind = "images" if len({row.path for row in rows}) == len(rows) else "maps"
    shown = f", {len(pairs)} of {len(rows)} {kind} shown" if len(rows) > len(pairs) else ""
    title = f"{job.method}, {job.network.backbone.card.name}{shown}"
    return Grid(title, lines, notes=[check.said for check in checks])


def _draw(job: MapJob, row: MapRow, seen: Image.Image) -> tuple[Tile, Tile]:
    values = row.heat.values
    drawn: Image.Image | str = f"not shown: {row.heat.reason}"
    if values is not None:
        drawn = draw_overlay(seen, _brighten(values.numpy()))
    lines = job.classes[row.index], job.describe(row)
    return Tile(seen, (Path(row.path).name, "network input")), Tile(drawn, lines)


def _brighten(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a map of pixels relative to its 99th percentile, and a map of few cells as it is."""
    if min(values.shape) < _FINE:
        return values
    top = max(float(np.quantile(values, 0.99)), float(values.max()) * 1e-3)
    bright: NDArray[np.float32] = np.minimum(values / top, 1).astype(np.float32)
    return bright


def _to_cells(job: MapJob, row: MapRow) -> tuple[Any, ...]:
    advantage = None if row.advantages is None else sum(row.advantages) / len(row.advantages)
    return row.path, job.classes[row.index], row.answer, row.logit, advantage, row.heat.reason


def _write_tables(job: MapJob, computed: Sequence[MapRow], rows: Sequence[MapRow], folder: Path) -> None:
    """Write the table and the maps; the maps that are not shown are among them, as numbers."""
    answer = "probability" if job.target.has_classes else "value"
    columns = ("path", "class", answer, "logit", "deletion_advantage", "not_shown")
    write_csv(folder / "heat-maps.csv", [_to_cells(job, row) for row in rows], columns)
    shape = next((row.heat.values.shape for row in computed if row.heat.values is not None), (0, 0))
    maps = np.zeros((len(computed), *shape), np.float32)
    for number, row in enumerate(computed):
        if row.heat.values is not None:
            maps[number] = row.heat.values.numpy()
    paths, classes = [row.path for row in computed], [job.classes[row.index] for row in computed]
    write_arrays(folder / "heat-maps.npz", paths=np.array(paths), classes=np.array(classes), maps=maps)
