"""``finetune explain influence``: the training images that a solved classifier owes its answers to.

::

    influence.png    each image beside the training images without which its answer loses or gains most
    influence.csv    path, predicted, label, other, margin, training image with its label, estimate, change,
                     answer without it
    explain.json     model, features, C, and of each image the fewest training images whose removal changes it

After :mod:`finetune.features.influence`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetune.data.dataset import PreparedDataset
from finetune.data.prepare import check_outside
from finetune.data.thumbnail import load_thumbnail
from finetune.errors import DataError, UsageError, count
from finetune.evaluation.label_issues import leave_changed_out
from finetune.explain.commands.record import say_written, write_record
from finetune.features.extraction import Features, Source, open_features, open_images, open_source
from finetune.features.influence import NUM_SOLVED, Influence, InfluenceSolver, LeftOut
from finetune.features.network import open_network
from finetune.features.rows import ConcatRows, Rows
from finetune.features.solvers import build_training_rows
from finetune.plots.sheet import CELL, Grid, Tile, write_grid
from finetune.recipe import Recipe
from finetune.runs.files import write_csv
from finetune.runs.folder import RunFolder
from finetune.runs.new_folder import new_folder
from finetune.runs.outcome import translated_errors
from finetune.runs.reader import PredictionRow, RunReader
from finetune.system.display import Display
from finetune.targets import rank_classes

METHOD = "influence"
MOST_IMAGES = 8
"""Mistakes that are explained where no image is named."""
_SHOWN = 3
"""Training images on either side in the picture."""
_COLUMNS = (
    *("path", "predicted", "label", "other", "margin"),
    *("training_path", "training_label", "estimate", "change", "answer"),
)


@dataclass(frozen=True)
class _Explained:
    """An answer, the class that it is compared with, and what it depends on."""

    row: PredictionRow
    other: str
    influence: Influence


def explain_influence(
    recipe: Recipe, images: Sequence[str], output: Path, display: Display
) -> dict[str, Any]:
    """Write which training images answers of a solved classifier depend on.

    Args:
        recipe: names a finished run whose classifier was solved (``strategy.features``), with one class an
            image; the device.
        images: evaluated images, as their paths in ``predictions.csv`` or as files; none for the most
            confident mistakes, at most :data:`MOST_IMAGES`.
        output: a new folder.
        display: shows progress.

    Returns:
        The content of ``explain.json``, and the path of the output.

    Raises:
        UsageError: the run has no solved classifier, or did not evaluate such an image.
        DataError: images of the run are gone.
    """
    with translated_errors():
        run = Path(str(recipe.backbone.name))
        reader = RunReader(RunFolder(run))
        began, layers, strength = _read_solved(run, reader)
        if recipe.data.path is not None:
            found = "the images are those of the run"
            raise UsageError(f"--data {recipe.data.path}", found, "Leave it out.")
        recipe = began.model_copy(update={"device": recipe.device})
        network = open_network(recipe, display)
        dataset = open_images(recipe, display)
        check_outside(output, dataset)
        rows = _choose(run, reader, dataset.root, images)
        source = open_source(recipe, network, dataset, display)
        source = replace(source, dataset=leave_changed_out(source, RunFolder(run), display))
        with new_folder(output) as folder:
            with open_features(source, network.layers.select(layers), "auto") as features:
                explained = _explain(source, features, rows, strength)
            _write(folder, source.dataset, explained)
            facts = {
                "layer": ", ".join(layers),
                "regularisation": strength,
                "num_images": len(explained),
                "answers": [_describe(source.dataset, one) for one in explained],
                "checks": {},
            }
            record = write_record(folder, METHOD, network, facts)
        for one in explained:
            display.say(_say(one))
        return say_written(output, record, display)


def _read_solved(run: Path, reader: RunReader) -> tuple[Recipe, list[str], float]:
    """Return the recipe of a run with its own images as data, the layers of its classifier, and C."""
    asked, metrics, recipe = f"finetune explain {METHOD} {run}", reader.metrics, reader.recipe
    if recipe is None or reader.state != "done":
        raise UsageError(
            asked, "it is not the folder of a finished run", "Name the --output of `finetune run`."
        )
    features, strength = metrics.get("features"), metrics.get("regularisation")
    if not isinstance(features, list) or not isinstance(strength, float):
        found = "its network was trained, and leaving an image out would mean training again"
        fix = "Name a run with a solved classifier: `--strategy freeze --set strategy.features=last`."
        raise UsageError(asked, found, fix)
    if not reader.predictions:
        raise UsageError(asked, "its labels are not one class an image", "Name a run of classes.")
    data = recipe.data.model_copy(update={"path": str(run)})
    return recipe.model_copy(update={"data": data}), [str(name) for name in features], strength


def _choose(run: Path, reader: RunReader, root: Path, images: Sequence[str]) -> list[PredictionRow]:
    """Return the answers to explain.

    Raises:
        UsageError: an image was not evaluated, or none is named and there is no mistake.
    """
    if not images:
        wrong = sorted(
            (row for row in reader.predictions if not row.is_right), key=lambda row: -row.confidence
        )
        if not wrong:
            found = f"none of its {count(len(reader.predictions), 'image')} was misclassified"
            raise UsageError(f"finetune explain {METHOD} {run}", found, "Name evaluated images.")
        return sorted(wrong, key=lambda row: -row.confidence)[:MOST_IMAGES]
    known = {row.path: row for row in reader.predictions}
    files = {(root / path).resolve(): row for path, row in known.items()}
    chosen = []
    for image in images:
        row = known.get(image) or files.get(Path(image).resolve())
        if row is None:
            fix = f"Name images of {run}/predictions.csv."
            raise UsageError(f"the image {image}", "the run did not evaluate it", fix)
        chosen.append(row)
    return chosen


def _explain(
    source: Source, features: Features, chosen: Sequence[PredictionRow], strength: float
) -> list[_Explained]:
    dataset, display = source.dataset, source.display
    places = {sample.path: index for index, sample in enumerate(dataset.samples)}
    gone = [row.path for row in chosen if row.path not in places or row.path in features.lost]
    if gone:
        raise DataError(f"the image {gone[0]}", "it is gone, or changed since the run", "Restore it.")
    whole: Rows = features.rows[0] if len(features.rows) == 1 else ConcatRows(features.rows)
    samples = dataset.of("train")
    train = features.usable(samples)
    labels = torch.tensor([samples[index].label for index in train.tolist()])
    with display.busy("solving the classifier"):
        training = build_training_rows(
            whole, train, labels, dataset.num_classes, source.network.placement.device
        )
        solver = InfluenceSolver(training, strength)
    explained = []
    with display.track("leaving training images out", len(chosen) * NUM_SOLVED) as advance:
        for row in chosen:
            coordinates = training.project(torch.tensor([places[row.path]]))[0]
            scores = solver.weights @ coordinates
            answer, label = (dataset.classes.index(name) for name in (row.predicted, row.label))
            second = next(index for index in rank_classes(scores.cpu().numpy(), 2) if index != answer)
            other = label if label != answer else second
            found = solver.explain(coordinates, answer, other, lambda number: advance(number, ""))
            explained.append(_Explained(row, dataset.classes[other], found))
    return explained


# --- results -------------------------------------------------------------------------------------


def _write(folder: Path, dataset: PreparedDataset, explained: Sequence[_Explained]) -> None:
    train = dataset.of("train")
    rows = [
        (
            *(one.row.path, one.row.predicted, one.row.label, one.other, f"{one.influence.margin:.4f}"),
            *(train[left.image].path, dataset.label_of(train[left.image])),
            *(f"{left.estimate:.4f}", f"{left.change:.4f}", dataset.classes[left.answer]),
        )
        for one in explained
        for left in one.influence.single
    ]
    write_csv(folder / "influence.csv", rows, _COLUMNS)
    write_grid(folder / "influence.png", _lay_out(dataset, explained))


def _lay_out(dataset: PreparedDataset, explained: Sequence[_Explained]) -> Grid:
    headings = ["the image", *["speaks for the answer"] * _SHOWN, *["speaks against it"] * _SHOWN]
    rows = []
    for one in explained:
        margin, name = f"margin {one.influence.margin:.2f}", Path(one.row.path).name
        lines = (f"answer {one.row.predicted}", f"label {one.row.label}", margin, name)
        image = Tile(load_thumbnail(dataset.root / one.row.path, CELL, dataset.value_range), lines)
        single = one.influence.single
        rows.append(
            [image, *(_draw(dataset, left) for left in (*single[:_SHOWN], *single[: -_SHOWN - 1 : -1]))]
        )
    notes = [
        "Margin: the logit of the answer less that of the label (of a right answer, less that of the second "
        "most probable class). Below each training image: how the margin changes if the classifier is solved "
        "again without it.",
    ]
    return Grid("Training images that answers depend on", rows, headings, notes)


def _draw(dataset: PreparedDataset, left: LeftOut) -> Tile:
    sample = dataset.of("train")[left.image]
    lines = (dataset.label_of(sample), f"margin {left.change:+.3f}", Path(sample.path).name)
    return Tile(load_thumbnail(dataset.file(sample), CELL, dataset.value_range), lines)


def _describe(dataset: PreparedDataset, one: _Explained) -> dict[str, Any]:
    train = dataset.of("train")
    return {
        "path": one.row.path,
        "predicted": one.row.predicted,
        "label": one.row.label,
        "other": one.other,
        "margin": one.influence.margin,
        "changed_without": [train[image].path for image in one.influence.together],
    }


def _say(one: _Explained) -> str:
    number, row = len(one.influence.together), one.row
    if not number:
        return f"{row.path}: no few images change the answer {row.predicted} (label {row.label})"
    images = count(number, "training image")
    return f"{row.path}: without {images} the answer is no longer {row.predicted} (label {row.label})"
