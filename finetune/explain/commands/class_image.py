"""``finetune explain class``: images with as high a score as possible for a class.

::

    class-images.png    a row for each class, a column for each seed
    class-images.csv    class, seed, lambda, score before the softmax at the start and at the end, probability
    class-images.npz    ``classes`` (R,), ``images`` (R, S, 3, H, W) uint8, of bands (R, S, C, H, W) float32
    explain.json        model, contrast, steps, checks, versions

Each image is checked as it is written (RGB is rounded to 8 bits): one that the network takes for another
class is not drawn. Shape legend: R classes, S seeds, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from finetune.data.transforms import Normalizer, draw_view
from finetune.errors import UsageError, count
from finetune.explain.class_image import CONTRAST, NUM_STEPS, compute_class_images
from finetune.explain.class_score import find_scores
from finetune.explain.commands.model import (
    find_class,
    find_target,
    open_model,
    require_classes,
    require_images,
)
from finetune.explain.commands.record import say_written, write_arrays, write_record
from finetune.features.network import Network
from finetune.plots.sheet import CELL, Grid, Tile, write_grid
from finetune.recipe import Recipe
from finetune.runs.files import write_csv
from finetune.runs.new_folder import new_folder
from finetune.runs.outcome import translated_errors
from finetune.system.display import Display
from finetune.targets import decide
from pretrained.preprocessing import Preprocessing

MOST_CLASSES = 10
"""Classes that are all drawn if none is named."""
_DEVIATIONS = 3.0
"""Bounds of an image of bands, in standard deviations of its channels."""
_COLUMNS = ("class", "seed", "lambda", "score_at_start", "score", "probability", "predicted")


@dataclass(frozen=True)
class _Drawn:
    """A class image, rounded to 8 bits, and what the network says of it."""

    view: Tensor
    index: int
    seed: int
    decay: float
    first_score: float
    score: float
    probability: float
    predicted: int


def explain_class(
    recipe: Recipe,
    output: Path,
    class_name: str | None,
    num_seeds: int,
    is_smooth: bool,
    display: Display,
) -> dict[str, Any]:
    """Write class images.

    Args:
        recipe: names the model; settings of input and machine.
        output: a new folder.
        class_name: the class; None for all classes of a model with at most :data:`MOST_CLASSES`.
        num_seeds: images of each class.
        is_smooth: shift and blur the images while they are computed.
        display: shows progress.

    Returns:
        The content of ``explain.json``, and the path of the output.

    Raises:
        FinetuneError: the command fails; the subclass gives the exit code (docs/errors.md).
    """
    with translated_errors():
        if num_seeds < 1:
            raise UsageError(f"--seeds {num_seeds}", "an image needs a seed", "Take 1 or more.")
        network = open_model(recipe, display)
        require_images(network)
        classes = require_classes(network)
        indices = _choose(classes, class_name)
        seeds = range(recipe.seed, recipe.seed + num_seeds)
        with new_folder(output) as folder:
            rows: list[list[_Drawn]] = []
            with display.track("computing class images", len(indices) * NUM_STEPS) as advance:
                for index in indices:
                    step = partial(advance, 1, classes[index])
                    rows.append(_compute(network, index, seeds, is_smooth, step))
            record = _write(network, classes, rows, is_smooth, folder)
        display.say(record["checks"]["recognised"]["said"])
        return say_written(output, record, display)


def _choose(classes: Sequence[str], name: str | None) -> list[int]:
    if name is not None:
        return [find_class(classes, name)]
    if len(classes) > MOST_CLASSES:
        found = f"the model has {len(classes)} classes, and none was named"
        raise UsageError("finetune explain class", found, "Add --class NAME.")
    return list(range(len(classes)))


def _compute(
    network: Network, index: int, seeds: Sequence[int], is_smooth: bool, advance: Callable[[], None]
) -> list[_Drawn]:
    card, device = network.backbone.card, network.placement.device
    size = card.preprocessing.input_size
    normalize = Normalizer(card.preprocessing, device)
    ends = (_plain(card.preprocessing, end) for end in (0, 1))
    black, white = (normalize(end.to(device))[0] for end in ends)
    scores_of = find_scores(network.backbone.network, size)
    start = torch.zeros(size, device=device)  # the mean that the network subtracts
    found = compute_class_images(
        scores_of, index, start, (black, white), seeds, is_smooth=is_smooth, advance=advance
    )
    views = found.pixels
    if card.preprocessing.is_rgb:
        share = (found.pixels - black.cpu()) / (white - black).cpu()
        views = (255 * share).round().clamp(0, 255).to(torch.uint8)
    with torch.inference_mode():
        scores = scores_of(normalize(views.to(device))).cpu()
    probabilities, predicted = find_target(network).activate(scores / card.temperature), decide(scores)
    return [
        _Drawn(
            views[number],
            index,
            seed,
            float(found.decays[number]),
            float(found.scores[0, number]),
            float(scores[number, index]),
            float(probabilities[number, index]),
            int(predicted[number]),
        )
        for number, seed in enumerate(seeds)
    ]


def _plain(preprocessing: Preprocessing, end: int) -> Tensor:
    """Return a pixel of the lowest (0) or of the highest (1) values that an image may have."""
    if preprocessing.is_rgb:
        return torch.full((1, 3, 1, 1), 255 * end, dtype=torch.uint8)
    return torch.full((1, preprocessing.channels, 1, 1), _DEVIATIONS * (2.0 * end - 1))


def _write(
    network: Network, classes: Sequence[str], rows: Sequence[Sequence[_Drawn]], is_smooth: bool, folder: Path
) -> dict[str, Any]:
    drawn = [one for row in rows for one in row]
    check = _judge(drawn)
    cells = [
        (
            classes[one.index],
            one.seed,
            f"{one.decay:.6g}",
            f"{one.first_score:.4f}",
            f"{one.score:.4f}",
            f"{one.probability:.6f}",
            classes[one.predicted],
        )
        for one in drawn
    ]
    write_csv(folder / "class-images.csv", cells, _COLUMNS)
    images = np.stack([np.stack([one.view.numpy() for one in row]) for row in rows])
    names = np.array([classes[row[0].index] for row in rows])
    write_arrays(folder / "class-images.npz", classes=names, images=images)
    write_grid(folder / "class-images.png", _lay_out(network, classes, rows, is_smooth, check["said"]))
    facts = {
        "classes": [classes[row[0].index] for row in rows],
        "seeds": [one.seed for one in rows[0]],
        "contrast": CONTRAST,
        "num_steps": NUM_STEPS,
        "is_smooth": is_smooth,
        "checks": {"recognised": check},
    }
    return write_record(folder, "class", network, facts)


def _judge(drawn: Sequence[_Drawn]) -> dict[str, Any]:
    """Return how many of the images, as they are written, the network takes for their class."""
    right = sum(one.predicted == one.index for one in drawn)
    said = f"As written, {right} of {count(len(drawn), 'image')} have the class as the most probable."
    return {"passed": right == len(drawn), "num_right": right, "num_images": len(drawn), "said": said}


def _lay_out(
    network: Network,
    classes: Sequence[str],
    rows: Sequence[Sequence[_Drawn]],
    is_smooth: bool,
    said: str,
) -> Grid:
    side = min(max(*network.backbone.card.preprocessing.size, CELL), 2 * CELL)
    tiles = [[_tile(one, classes, side) for one in row] for row in rows]
    how = "shifted and blurred while they were computed, " if is_smooth else ""
    notes = [
        f"Gradient ascent on the score of the class, {how}from the mean of the training images. These are "
        "images that the network scores highly, and no photographs of the class.",
        said,
    ]
    title = f"class images of {network.backbone.card.name}"
    return Grid(title, tiles, [f"seed {one.seed}" for one in rows[0]], notes, side)


def _tile(one: _Drawn, classes: Sequence[str], side: int) -> Tile:
    scores = f"score {one.first_score:.1f} to {one.score:.1f}"
    lines = (classes[one.index], scores, f"probability {one.probability:.3f}")
    if one.predicted != one.index:
        return Tile(f"not shown: the network takes this image for {classes[one.predicted]}", lines)
    return Tile(ImageOps.contain(draw_view(one.view), (side, side), Image.Resampling.NEAREST), lines)
