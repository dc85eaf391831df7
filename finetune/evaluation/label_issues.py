"""Suspected wrong labels: confident learning (Northcutt, Jiang and Chuang, arXiv:1911.00068).

A class's threshold is the mean probability that images with its label are given for it. An image that reaches
the threshold of another class than its label's, and for which its label is not the likeliest, is suspected.
These are the off-diagonal entries of the paper's confident joint, as in cleanlab's
``find_label_issues(filter_by="confident_learning")``, against which the tests hold this.

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

from finetune.data.dataset import Dataset, Sample
from finetune.data.prepare import check_outside, create_new_folder, require_labels
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
from finetune.runs.outcome import translated_errors
from finetune.runs.reader import RunReader
from finetune.system.display import Display
from finetune.targets import LINEAR_CLASSIFIER, decide, to_probabilities

_ROUNDING = 1e-6
"""Under a threshold that still counts as reached: probabilities are float32."""


def find_label_issues(labels: Tensor, probabilities: Tensor) -> Tensor:
    """Return the images whose labels are suspected, the least likely label first, (M,) int64.

    Args:
        labels: (N,) int64, as given.
        probabilities: (N, K), by classifiers that have not seen the image.
    """
    likeliest = decide(probabilities)
    reached = probabilities >= compute_thresholds(labels, probabilities) - _ROUNDING
    number = reached.sum(dim=1)
    # Of several classes that are reached, the likeliest of all counts, as in the paper.
    guess = torch.where(number > 1, likeliest, decide(reached.int()))
    issues = ((number > 0) & (guess != labels) & (likeliest != labels)).nonzero().flatten()
    own = probabilities[issues, labels[issues]]
    return issues[own.argsort(stable=True)]


def compute_thresholds(labels: Tensor, probabilities: Tensor) -> Tensor:
    """Return the mean probability of each class over the images with its label, (K,); infinite without."""
    num_classes = probabilities.shape[1]
    own = probabilities.gather(1, labels[:, None]).flatten().double()
    sums = torch.zeros(num_classes, dtype=torch.float64).index_add_(0, labels, own)
    counts = labels.bincount(minlength=num_classes)
    return torch.where(counts > 0, sums / counts, torch.inf)


# --- ``finetune check --run``: which labels of a run's images are suspected to be wrong ---
#
# ::
#
#     the run's images -> features of its backbone as it was published, which has not seen the labels
#                      -> linear classifiers, each image judged by one that did not see it
#                      -> confident learning -> label_issues.csv, label_issues.png


NUM_FOLDS = 5
SHOWN = 36
"""Images on the sheet."""
FILE, SHEET = "label_issues.csv", "label_issues.png"
COLUMNS = ("path", "label", "suggested", "label_probability", "suggested_probability", "split")


@dataclass(frozen=True)
class LabelIssues:
    """What was found.

    Attributes:
        rows: of ``label_issues.csv``, the least likely label first.
        num_judged: images that were judged by a classifier that had not seen them.
        num_images: of the run.
        accuracy: of those classifiers, by the labels as they are.
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
    """Find labels of a run's images that are probably wrong, and write them down.

    Args:
        run: a run folder; it is only read.
        output: a new folder.
        display: shows progress.

    Raises:
        FinetuneError: every refusal and failure.
    """
    with translated_errors():
        recipe = _read_recipe(run)
        network = open_network(recipe, display)
        dataset = open_images(recipe, display)
        require_labels(dataset, recipe)
        check_outside(output, dataset)
        source = open_source(recipe, network, dataset, display)
        dataset = _leave_changed_out(source, RunFolder(run), display)
        source = replace(source, dataset=dataset)
        _warn_of_seen(recipe, source, display)
        create_new_folder(output)
        with open_features(source, network.layers.select(["last"]), "auto") as features:
            usable = features.usable(dataset.samples)
            samples = [dataset.samples[index] for index in usable.tolist()]
            folds = _deal(samples, dataset, source.digests, recipe.seed)
            probabilities = _judge(
                features.rows[0], usable, samples, folds, dataset.num_classes, recipe.seed, display
            )
        found = _collect(dataset, samples, folds, probabilities)
        write_csv(output / FILE, found.rows, COLUMNS)
        write_sections(output / SHEET, _sections(dataset, found))
        return found


def _read_recipe(path: Path) -> Recipe:
    run = RunFolder(path)
    recipe = RunReader(run).recipe if run.split.is_file() and run.recipe.is_file() else None
    if recipe is None:
        found = "it is no run folder, or the run has not begun to train"
        raise UsageError(f"--run {path}", found, "Name the --output of a `finetune run`.")
    if recipe.strategy.starts_random:
        found = "it was trained from random weights, so that there is no network that has not seen the labels"
        raise UsageError(f"--run {path}", found, "Name a run with pretrained weights.")
    data = recipe.data.model_copy(update={"path": str(path)})
    return recipe.model_copy(update={"data": data, "device": "auto"})


def _leave_changed_out(source: Source, run: RunFolder, display: Display) -> Dataset:
    """Return the images that are what the run recorded; of others it has no label.

    Raises:
        DataError: none is left.
    """
    recorded = RunReader(run).digests
    digests = source.digests
    changed = [one.path for one in source.dataset.samples if recorded.get(one.path) != digests[one.path]]
    if changed:
        images = f"1 image, {changed[0]}, is" if len(changed) == 1 else f"{len(changed)} images are"
        display.warn(f"{images} not what the run saw, and left out")
    dataset = source.dataset.without(changed)
    if not dataset.samples:
        found = "none of its images is what it was"
        raise DataError(f"--run {run.path}", found, "Run again, or bring the images back.")
    return dataset


def _warn_of_seen(recipe: Recipe, source: Source, display: Display) -> None:
    """Tell how many images the backbone has seen with their labels, where it is itself a run."""
    seen = find_ancestors(recipe)
    known = seen.trained | seen.chose
    number = sum(source.digests[sample.path] in known for sample in source.dataset.samples)
    if number:
        display.warn(
            f"the backbone of this run is a run itself, and was trained on or chosen by {number} of these "
            "images: wrong labels that it learnt look right"
        )
    elif not seen.is_known:
        display.warn("it is not known which images the backbone of this run has seen with their labels")


def _deal(samples: Sequence[Sample], dataset: Dataset, digests: dict[str, str], seed: int) -> Tensor:
    """Return the fold in which each image is held out, (N,) from 1; 0: never.

    Copies and groups stay together. A class that would lie in one fold alone is never held out: there would
    be nothing to know it by.
    """
    joined = {
        sample.path: unit[0].path
        for unit in join_copies(samples, digests)
        if len(unit) > 1
        for sample in unit
    }
    pool: defaultdict[str, list[str]] = defaultdict(list)
    for sample in samples:
        pool[dataset.classes[sample.label]].append(sample.path)
    folds = draw_folds(pool, NUM_FOLDS, seed, joined)
    alone = {name for name, paths in pool.items() if len({folds[path] for path in paths}) < 2}
    return torch.tensor([0 if dataset.classes[one.label] in alone else folds[one.path] for one in samples])


def _judge(
    rows: Rows,
    usable: Tensor,
    samples: Sequence[Sample],
    folds: Tensor,
    num_classes: int,
    seed: int,
    display: Display,
) -> Tensor:
    """Return probabilities (N, K) by classifiers that did not see the image; NaN where there is none."""
    labels = torch.tensor([sample.label for sample in samples])
    probabilities = torch.full((len(samples), num_classes), torch.nan)
    with display.track("judging labels", NUM_FOLDS) as advance:
        for fold in range(1, NUM_FOLDS + 1):
            held = folds == fold
            if held.any():
                classifier = fit(rows, usable[~held], labels[~held], num_classes, LINEAR_CLASSIFIER, seed)
                probabilities[held] = to_probabilities(classifier.scores(rows[usable[held]])).cpu()
            advance(1, "")
    return probabilities


def _collect(
    dataset: Dataset, samples: Sequence[Sample], folds: Tensor, probabilities: Tensor
) -> LabelIssues:
    judged = (folds > 0).nonzero().flatten()
    if not len(judged):
        found = "no class has two images that are not copies of each other"
        raise DataError("suspected labels", found, "Add images.")
    labels = torch.tensor([samples[index].label for index in judged.tolist()])
    known = probabilities[judged]
    predicted = decide(known)
    rows = []
    for place in find_label_issues(labels, known).tolist():
        sample, suggested = samples[int(judged[place])], int(predicted[place])
        own, other = known[place, sample.label].item(), known[place, suggested].item()
        names = dataset.classes[sample.label], dataset.classes[suggested]
        rows.append((sample.path, *names, own, other, sample.split))
    accuracy = (predicted == labels).double().mean().item()
    return LabelIssues(rows, len(judged), len(samples), accuracy)


def _sections(dataset: Dataset, found: LabelIssues) -> list[Section]:
    tiles = [
        Tile(
            load_thumbnail(dataset.root / path, CELL),
            (f"{label}: {own:.3f}", f"{suggested}: {other:.3f}", Path(path).name),
        )
        for path, label, suggested, own, other, _ in found.rows[:SHOWN]
    ]
    title = "Labels that are probably wrong: as given, as suggested, with their probabilities"
    return [Section(title, len(found.rows), tiles)] if tiles else []
