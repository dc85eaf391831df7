"""``finetune check --run``: labels of a run's images that are probably wrong, by confident learning.

::

    the run's images -> features of its backbone as published, which has not seen the labels
                     -> cross-validated linear classifiers: each image is predicted by one that did not see it
                     -> confident learning -> label_issues.csv, label_issues.png

Confident learning (Northcutt, Jiang and Chuang, arXiv:1911.00068): the threshold of a class is the mean
probability of that class over the images with its label. An image is suspected if it reaches the threshold of
another class and its label is not the most probable class. These are the off-diagonal entries of the paper's
confident joint, as in cleanlab's ``find_label_issues(filter_by="confident_learning")``; tests compare them.

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
from finetune.data.prepare import check_outside, require_classes
from finetune.data.provenance import find_ancestors
from finetune.data.split import draw_folds, join_copies
from finetune.data.thumbnail import load_thumbnail
from finetune.errors import DataError, UsageError
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
from finetune.targets import LINEAR_CLASSIFIER, decide, to_probabilities

_ROUNDING = 1e-6
"""Tolerance below a threshold, since probabilities are float32."""
NUM_FOLDS = 5
SHOWN = 36
"""Largest number of images on the contact sheet."""
FILE, SHEET = "label_issues.csv", "label_issues.png"
COLUMNS = ("path", "label", "suggested", "label_probability", "suggested_probability", "split")


def find_label_issues(labels: Tensor, probabilities: Tensor) -> Tensor:
    """Return the indices of the images with suspected labels, the least probable label first, (M,) int64.

    Args:
        labels: (N,) int64, the given labels.
        probabilities: (N, K), each row by a classifier that was not trained on the image.
    """
    most_probable = decide(probabilities)
    reached = probabilities >= compute_thresholds(labels, probabilities) - _ROUNDING
    number = reached.sum(dim=1)
    # If several thresholds are reached, the most probable class counts, as in the paper.
    guess = torch.where(number > 1, most_probable, decide(reached.int()))
    issues = ((number > 0) & (guess != labels) & (most_probable != labels)).nonzero().flatten()
    own = probabilities[issues, labels[issues]]
    return issues[own.argsort(stable=True)]


def compute_thresholds(labels: Tensor, probabilities: Tensor) -> Tensor:
    """Return the mean probability of each class over the images with its label, (K,); infinite if none."""
    num_classes = probabilities.shape[1]
    own = probabilities.gather(1, labels[:, None]).flatten().double()
    sums = torch.zeros(num_classes, dtype=torch.float64).index_add_(0, labels, own)
    counts = labels.bincount(minlength=num_classes)
    return torch.where(counts > 0, sums / counts, torch.inf)


# --- the command ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelIssues:
    """The suspected labels of a run's images.

    Attributes:
        rows: the rows of ``label_issues.csv``, the least probable label first.
        num_scored: images that were predicted by a classifier that was not trained on them.
        num_images: images of the run.
        accuracy: accuracy of these classifiers with the given labels, in [0, 1].
    """

    rows: Sequence[tuple[Any, ...]]
    num_scored: int
    num_images: int
    accuracy: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {
            "num_images": self.num_images,
            "num_judged": self.num_scored,
            "accuracy": self.accuracy,
            "label_issues": [dict(zip(COLUMNS, row, strict=True)) for row in self.rows],
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
        require_classes(dataset, recipe)
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
                probabilities = _cross_validate(source, features.rows[0], usable, folds)
            found = _collect(dataset, samples, folds, probabilities)
            write_csv(folder / FILE, found.rows, COLUMNS)
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
    pool: defaultdict[str, list[str]] = defaultdict(list)
    for sample in samples:
        pool[dataset.classes[sample.label]].append(sample.path)
    folds = draw_folds(pool, NUM_FOLDS, seed, joined)
    alone = {name for name, paths in pool.items() if len({folds[path] for path in paths}) < 2}
    return torch.tensor(
        [0 if dataset.classes[sample.label] in alone else folds[sample.path] for sample in samples]
    )


def _cross_validate(source: Source, rows: Rows, usable: Tensor, folds: Tensor) -> Tensor:
    """Return probabilities (N, K) by classifiers not trained on the image; NaN if never held out."""
    num_classes, seed, device = (
        source.dataset.num_classes,
        source.recipe.seed,
        source.network.placement.device,
    )
    labels = torch.tensor([source.dataset.samples[index].label for index in usable.tolist()])
    probabilities = torch.full((len(labels), num_classes), torch.nan)
    with source.display.track("checking labels", NUM_FOLDS) as advance:
        for fold in range(1, NUM_FOLDS + 1):
            held = folds == fold
            if held.any():
                train, own = usable[~held], labels[~held]
                classifier = fit(rows, train, own, num_classes, LINEAR_CLASSIFIER, seed, device)
                probabilities[held] = to_probabilities(classifier.scores(rows[usable[held]]))
            advance(1, "")
    return probabilities


def _collect(
    dataset: Dataset, samples: Sequence[Sample], folds: Tensor, probabilities: Tensor
) -> LabelIssues:
    scored = (folds > 0).nonzero().flatten()
    if not len(scored):
        found = "no class has two images that are not copies of each other"
        raise DataError("suspected labels", found, "Add images.")
    labels = torch.tensor([samples[index].label for index in scored.tolist()])
    known = probabilities[scored]
    predicted = decide(known)
    rows = []
    for index in find_label_issues(labels, known).tolist():
        sample, suggested = samples[int(scored[index])], int(predicted[index])
        own, other = known[index, sample.label].item(), known[index, suggested].item()
        names = dataset.classes[sample.label], dataset.classes[suggested]
        rows.append((sample.path, *names, own, other, sample.split))
    accuracy = (predicted == labels).double().mean().item()
    return LabelIssues(rows, len(scored), len(samples), accuracy)


def _sections(dataset: PreparedDataset, found: LabelIssues) -> list[Section]:
    tiles = [
        Tile(
            load_thumbnail(dataset.root / path, CELL, dataset.value_range),
            (f"{label}: {own:.3f}", f"{suggested}: {other:.3f}", Path(path).name),
        )
        for path, label, suggested, own, other, _ in found.rows[:SHOWN]
    ]
    title = "Labels that are probably wrong: as given, as suggested, with their probabilities"
    return [Section(title, len(found.rows), tiles)] if tiles else []
