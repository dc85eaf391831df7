"""``finetune check --run``: labels of a run's images that are probably wrong, by confident learning.

::

    the run's images -> features of its backbone as published, which has not seen the labels
                     -> cross-validated linear classifiers: each image is predicted by one that did not see it
                     -> confident learning -> label_issues.csv, label_issues.png

Confident learning (Northcutt, Jiang and Chuang, arXiv:1911.00068): the threshold of a class is the mean
probability of that class over the images with its label. An image is suspected if it reaches the threshold of
another class and its label is not the most probable class. These are the off-diagonal entries of the paper's
confident joint, as in cleanlab's ``find_label_issues(filter_by="confident_learning")``; tests compare them.
Of several labels, each class and its absence are such a pair of classes; a number is suspected if the error
of its prediction is an outlier (:mod:`finetune.evaluation.number`).

Shape legend: N images, K classes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.data.dataset import Dataset, PreparedDataset, Sample
from finetune.data.prepare import check_outside, require_labels
from finetune.data.provenance import find_ancestors
from finetune.data.split import draw_folds, join_copies
from finetune.data.thumbnail import load_thumbnail
from finetune.errors import DataError, UsageError
from finetune.evaluation.predictions import Predictions
from finetune.evaluation.summary import JUDGES
from finetune.features.extraction import Source, open_features, open_images, open_source
from finetune.features.network import open_network
from finetune.features.rows import Rows
from finetune.features.solvers import fit
from finetune.plots.sheet import CELL, Section, Tile, write_sections
from finetune.recipe import Recipe
from finetune.runs.files import write_csv
from finetune.runs.folder import RunFolder
from finetune.runs.new_folder import new_folder
from finetune.runs.outcome import translated_errors
from finetune.runs.reader import RunReader, require_run
from finetune.system.display import Display

NUM_FOLDS = 5
SHOWN = 36
"""Largest number of images on the contact sheet."""
NONE = "none"
"""Shown for the label of an image that has no class."""
FILE, SHEET = "label_issues.csv", "label_issues.png"


# --- the command ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelIssues:
    """The suspected labels of a run's images.

    Attributes:
        columns: the columns of ``label_issues.csv``.
        rows: its rows, the least probable label first.
        captions: two lines on each of them.
        num_scored: images that were predicted by a classifier that was not trained on them.
        num_images: images of the run.
        metric: what these classifiers are judged by with the given labels: ``accuracy``, ``map`` or ``r2``.
        score: its value.
    """

    columns: Sequence[str]
    rows: Sequence[tuple[Any, ...]]
    captions: Sequence[tuple[str, str]]
    num_scored: int
    num_images: int
    metric: str
    score: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {
            "num_images": self.num_images,
            "num_judged": self.num_scored,
            self.metric: self.score,
            "label_issues": [dict(zip(self.columns, row, strict=True)) for row in self.rows],
        }


def find_run_label_issues(run: Path, output: Path, display: Display) -> LabelIssues:
    """Find labels of a run's images that are probably wrong, and write them to a table and a contact sheet.

    Args:
        run: a run folder; it is only read.
        output: a new folder for ``label_issues.csv`` and ``label_issues.png``.
        display: shows progress.

    Raises:
        FinetuneError: the command fails; the subclass gives the exit code (docs/errors.md).
    """
    with translated_errors():
        recipe = _read_recipe(run)
        network = open_network(recipe, display)
        dataset = open_images(recipe, display)
        require_labels(dataset, recipe)
        check_outside(output, dataset)
        source = open_source(recipe, network, dataset, display)
        dataset = leave_changed_out(source, RunFolder(run), display)
        source = replace(source, dataset=dataset)
        _warn_of_seen(recipe, source, display)
        with new_folder(output) as folder:
            with open_features(source, network.layers.select(["last"]), "auto") as features:
                usable = features.usable(dataset.samples)
                samples = [dataset.samples[index] for index in usable.tolist()]
                folds = _assign_folds(samples, dataset, recipe.seed)
                outputs = _cross_validate(source, features.rows[0], usable, folds)
            found = _collect(dataset, samples, folds, outputs)
            write_csv(folder / FILE, found.rows, found.columns)
            write_sections(folder / SHEET, _sections(dataset, found))
        return found


def _read_recipe(path: Path) -> Recipe:
    recipe = require_run(path)
    if recipe.strategy.starts_random:
        found = "it was trained from random weights: there is no network that has not seen the labels"
        raise UsageError(f"--run {path}", found, "Name a run with pretrained weights.")
    data = recipe.data.model_copy(update={"path": str(path)})
    return recipe.model_copy(update={"data": data, "device": "auto"})


def leave_changed_out(source: Source, run: RunFolder, display: Display) -> PreparedDataset:
    """Return the images that did not change since the run, whose labels it recorded.

    Raises:
        DataError: all images changed.
    """
    recorded = RunReader(run).digests
    digests = source.dataset.digests
    changed = [
        sample.path for sample in source.dataset.samples if recorded.get(sample.path) != digests[sample.path]
    ]
    if changed:
        images = f"1 image ({changed[0]})" if len(changed) == 1 else f"{len(changed)} images"
        display.warn(f"{images} changed since the run: left out")
    dataset = source.dataset.without(changed)
    if not dataset.samples:
        found = "all of its images changed since the run"
        raise DataError(f"--run {run.path}", found, "Run again, or restore the images.")
    return dataset


def _warn_of_seen(recipe: Recipe, source: Source, display: Display) -> None:
    """Warn if the backbone is a run itself, which has seen some of the images with their labels."""
    seen = find_ancestors(recipe)
    known = seen.trained | seen.chose
    number = sum(source.dataset.digests[sample.path] in known for sample in source.dataset.samples)
    if number:
        display.warn(
            f"the backbone of this run is a run itself, and was trained on or chosen by {number} of these "
            "images: wrong labels that it learned look right"
        )
    elif not seen.is_known:
        display.warn("it is not known which images the backbone of this run has seen with their labels")


def _assign_folds(samples: Sequence[Sample], dataset: PreparedDataset, seed: int) -> Tensor:
    """Return the fold in which each image is held out, (N,) int64 from 1; 0 for never.

    Copies and groups stay in one fold. A class that lies entirely in one fold is never held out, because no
    image of it would be left for training.
    """
    joined = {
        sample.path: unit[0].path
        for unit in join_copies(samples, dataset.digests)
        if len(unit) > 1
        for sample in unit
    }
    by_label: defaultdict[str, list[str]] = defaultdict(list)
    for sample in samples:
        by_label[dataset.label_of(sample)].append(sample.path)
    pool = dataset.target.strata(by_label)
    folds = draw_folds(pool, NUM_FOLDS, seed, joined)
    alone = [paths for paths in pool.values() if len({folds[path] for path in paths}) < 2]
    folds |= dict.fromkeys((path for paths in alone for path in paths), 0)
    return torch.tensor([folds.get(sample.path, 0) for sample in samples])


def _cross_validate(source: Source, rows: Rows, usable: Tensor, folds: Tensor) -> Tensor:
    """Return the outputs (N, K) of classifiers not trained on the image; NaN if never held out."""
    dataset, seed, device = source.dataset, source.recipe.seed, source.network.placement.device
    labels = dataset.encode([dataset.samples[index] for index in usable.tolist()])
    outputs = torch.full((len(labels), dataset.num_classes), torch.nan)
    with source.display.track("checking labels", NUM_FOLDS) as advance:
        for fold in range(1, NUM_FOLDS + 1):
            held = folds == fold
            if held.any():
                train, own = usable[~held], labels[~held]
                kind = dataset.target.solver
                classifier = fit(rows, train, own, dataset.num_classes, kind, seed, device)
                outputs[held] = classifier.scores(rows[usable[held]])
            advance(1, "")
    return outputs


def _collect(dataset: Dataset, samples: Sequence[Sample], folds: Tensor, outputs: Tensor) -> LabelIssues:
    scored = [samples[index] for index in (folds > 0).nonzero().flatten().tolist()]
    if not scored:
        found = "no class has two images that are not copies of each other"
        raise DataError("suspected labels", found, "Add images.")
    target, judge = dataset.target, JUDGES[dataset.target.kind]
    predictions = Predictions(outputs[folds > 0], dataset.encode(scored), target)
    issues = judge.find_issues(predictions, dataset.classes)
    rows, captions = [], []
    for issue in issues:
        sample = scored[issue.place]
        label = dataset.label_of(sample)
        rows.append((sample.path, label, issue.suggested, *issue.values, sample.split))
        captions.append(
            (f"{label or NONE}{issue.captions[0]}", f"{issue.suggested or NONE}{issue.captions[1]}")
        )
    columns = ("path", "label", "suggested", *judge.issue_columns, "split")
    return LabelIssues(columns, rows, captions, len(scored), len(samples), target.score, predictions.score)


def _sections(dataset: PreparedDataset, found: LabelIssues) -> list[Section]:
    tiles = [
        Tile(load_thumbnail(dataset.root / row[0], CELL, dataset.value_range), (*lines, Path(row[0]).name))
        for row, lines in zip(found.rows[:SHOWN], found.captions, strict=False)
    ]
    title = "Labels that are probably wrong: as given, and as suggested"
    return [Section(title, len(found.rows), tiles)] if tiles else []
