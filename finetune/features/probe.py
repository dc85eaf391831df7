"""``finetune probe``: classifiers on the features of layers, as in Zeiler and Fergus (arXiv:1311.2901).

Some images of each class train and the rest test; the score is the mean accuracy over classes. This is
repeated over random draws of the training images.

Shape legend: N labelled images, D features, K classes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from finetune.data.prepare import check_outside, require_classes
from finetune.errors import DataError, UsageError, suggest
from finetune.features.extraction import Features, Source, open_features, open_images, open_source
from finetune.features.network import open_network, take_channels
from finetune.features.rows import Rows, SubsetRows
from finetune.features.solvers import Kind, LinearClassifier, build_training_rows, choose_and_solve
from finetune.features.transferability import classify
from finetune.plots.features import draw_probe
from finetune.recipe import Recipe
from finetune.runs.files import write_csv
from finetune.runs.new_folder import new_folder
from finetune.runs.outcome import translated_errors
from finetune.system.device import derive_seed
from finetune.system.display import Display
from finetune.targets import decide
from pretrained.graph.layers import Layer
from pretrained.graph.pooling import Pool

Classifier = Literal["svm", "softmax", "logreg", "knn"]
CLASSIFIERS: tuple[Classifier, ...] = get_args(Classifier)
_KINDS: dict[Classifier, Kind] = {"svm": "svm", "softmax": "softmax", "logreg": "logreg"}
_BLOCK_BYTES = 256 * 2**20
"""Bytes of features of test images that are scored at a time."""


def read_classifiers(words: Sequence[str]) -> list[Classifier]:
    """Return the named classifiers without duplicates.

    Raises:
        UsageError: a name is unknown, or none is given.
    """
    known = {str(kind): kind for kind in CLASSIFIERS}
    for word in words:
        if word not in known:
            found = f"there is no such classifier{suggest(word, known)}"
            raise UsageError(f"--classifiers {word}", found, f"Choose {', '.join(known)}.")
    if not words:
        raise UsageError("--classifiers", "none was named", f"Choose {', '.join(known)}.")
    return [known[word] for word in dict.fromkeys(words)]


@dataclass(frozen=True)
class ProbeSplit:
    """Training and test images of one repeat: indices (int64) into the labelled images, and a seed."""

    train: Tensor
    test: Tensor
    seed: int


@dataclass(frozen=True)
class ProbeResult:
    """The accuracies of one classifier on one layer.

    Attributes:
        classifier: its kind.
        accuracies: mean accuracy over classes of each repeat, in [0, 1].
        strengths: the C of each repeat; empty for nearest neighbours.
    """

    classifier: Classifier
    accuracies: tuple[float, ...]
    strengths: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean of the accuracies over repeats."""
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float:
        """Sample standard deviation of the accuracies over repeats; 0 for a single repeat."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


def draw_probe_split(
    labels: Tensor, classes: Sequence[str], per_class: int, seed: int, repeat: int
) -> ProbeSplit:
    """Draw training images of each class; the others are test images.

    Args:
        labels: (N,) int64.
        classes: names of the K classes.
        per_class: training images of each class.
        seed: the seed of all repeats.
        repeat: index of the repeat.

    Raises:
        DataError: there is only one class, or a class has no image left for testing.
    """
    if len(classes) < 2:
        found = "there is only one class"
        raise DataError(f"--per-class {per_class}", found, "Give images of two classes or more.")
    counts = labels.bincount(minlength=len(classes))
    smallest = int(counts.argmin())
    if counts[smallest] <= per_class:
        has = f"class {classes[smallest]!r} has {int(counts[smallest])}, and one must be left for testing"
        most = int(counts[smallest]) - 1
        fix = f"Use --per-class {most} or fewer." if most > 0 else "Add images of this class, or remove it."
        raise DataError(f"--per-class {per_class}", has, fix)
    own = derive_seed(seed, "probe", repeat)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(own))
    mine = [order[labels[order] == label] for label in range(len(classes))]
    train = torch.cat([images[:per_class] for images in mine])
    test = torch.cat([images[per_class:] for images in mine])
    return ProbeSplit(train, test, own)


def probe_layer(
    rows: Rows,
    labels: Tensor,
    num_classes: int,
    draws: Sequence[ProbeSplit],
    classifiers: Sequence[Classifier],
    on_done: Callable[[], None],
    device: torch.device,
) -> list[ProbeResult]:
    """Train and test classifiers on the features of one layer.

    Args:
        rows: features (N, D) of the labelled images.
        labels: (N,) int64.
        num_classes: K.
        draws: the splits by :func:`draw_probe_split`, one a repeat.
        classifiers: the kinds, at least one.
        on_done: called after each classifier of each repeat.
        device: device that solves the linear classifiers.
    """
    accuracies: dict[Classifier, list[float]] = {kind: [] for kind in classifiers}
    strengths: dict[Classifier, list[float]] = {kind: [] for kind in classifiers}
    for draw in draws:
        own = labels[draw.train]
        linear = [kind for kind in classifiers if kind in _KINDS]
        training = build_training_rows(rows, draw.train, own, num_classes, device) if linear else None
        for kind in classifiers:
            if training is None or kind not in _KINDS:
                predicted = classify(rows, draw.train, own, draw.test, num_classes)
            else:
                classifier = choose_and_solve(training, _KINDS[kind], draw.seed)
                predicted = _predict(classifier, rows, draw.test)
                strengths[kind].append(classifier.strength)
            accuracies[kind].append(_mean_per_class(predicted, labels[draw.test]))
            on_done()
    return [ProbeResult(kind, tuple(accuracies[kind]), tuple(strengths[kind])) for kind in classifiers]


def _predict(classifier: LinearClassifier, rows: Rows, indices: Tensor) -> Tensor:
    """Return the predicted classes of M rows, (M,) int64."""
    parts = indices.split(max(1, _BLOCK_BYTES // (4 * rows.shape[1])))  # type: ignore[no-untyped-call]
    return torch.cat([decide(classifier.scores(rows[part])) for part in parts])


def _mean_per_class(predicted: Tensor, labels: Tensor) -> float:
    """Return the mean recall of the classes that have test images."""
    from sklearn.metrics import recall_score

    return float(recall_score(labels, predicted, labels=np.unique(labels), average="macro"))


# --- the command ---------------------------------------------------------------------------------


COLUMNS = (
    "layer",
    "depth",
    "num_features",
    "classifier",
    "mean_accuracy",
    "std_accuracy",
    "per_class",
    "repeats",
    "regularisation",
)


@dataclass(frozen=True)
class ProbeRow:
    """One classifier on one layer."""

    layer: Layer
    num_features: int
    result: ProbeResult

    def cells(self, per_class: int) -> tuple[Any, ...]:
        """Return the row of ``probe.csv``, in the order of :data:`COLUMNS`."""
        result = self.result
        strengths = " ".join(f"{strength:g}" for strength in result.strengths)
        return (
            self.layer.name,
            self.layer.share,
            self.num_features,
            result.classifier,
            result.mean,
            result.std,
            per_class,
            len(result.accuracies),
            strengths,
        )

    def to_dict(self, per_class: int) -> dict[str, Any]:
        """Return the row by column name."""
        return dict(zip(COLUMNS, self.cells(per_class), strict=True))


def probe(
    recipe: Recipe,
    wanted: Sequence[str],
    per_class: int,
    classifiers: Sequence[Classifier],
    repeats: int,
    output: Path,
    pool: Pool,
    display: Display,
) -> list[ProbeRow]:
    """Compare layers by the accuracy of linear classifiers and nearest neighbours on their features.

    All labelled images are used, of any split. In each repeat some images of each class train and the rest
    test.

    Args:
        recipe: settings of backbone, data, input, cache, machine and seed.
        wanted: names, keywords and patterns of layers.
        per_class: training images of each class.
        classifiers: the kinds, at least one.
        repeats: number of random draws of training images.
        output: a new folder for ``probe.csv`` and ``probe.png``.
        pool: how a layer's output becomes a row.
        display: shows progress.

    Raises:
        FinetuneError: the command fails; the subclass gives the exit code (docs/errors.md).
    """
    with translated_errors():
        dataset = open_images(recipe, display)
        require_classes(dataset, recipe)
        recipe = take_channels(recipe, dataset)
        network = open_network(recipe, display)
        layers = network.layers.select(wanted, pool)
        check_outside(output, dataset)
        every = torch.tensor([sample.label for sample in dataset.samples])
        draw_probe_split(every, dataset.classes, per_class, recipe.seed, 0)  # raises early
        source = open_source(recipe, network, dataset, display)
        with new_folder(output) as folder:
            samples = source.dataset.samples
            with open_features(source, layers, pool) as features:
                usable = leave_copies_out(features.usable(samples), source)
                labels = torch.tensor([samples[index].label for index in usable.tolist()])
                draws = [
                    draw_probe_split(labels, dataset.classes, per_class, recipe.seed, repeat)
                    for repeat in range(repeats)
                ]
                total = len(layers) * len(classifiers) * repeats
                with display.track("probing layers", total) as advance:
                    rows = _probe_layers(
                        features,
                        usable,
                        labels,
                        draws,
                        classifiers,
                        lambda: advance(1, ""),
                        network.placement.device,
                    )
            write_csv(folder / "probe.csv", [row.cells(per_class) for row in rows], COLUMNS)
            title = f"{network.backbone.card.name}, {per_class} training images a class"
            _draw_curves(rows, layers, classifiers, 1 / dataset.num_classes, title, folder / "probe.png")
        display.say(f"{output}/probe.csv, probe.png", style="bold")
        return rows


def leave_copies_out(usable: Tensor, source: Source) -> Tensor:
    """Return indices without exact copies: a test image must not be a copy of a training image."""
    samples = source.dataset.samples
    first: dict[str, int] = {}
    for index in usable.tolist():
        first.setdefault(source.dataset.digests[samples[index].path], index)
    if len(first) < len(usable):
        said = (
            "1 exact copy is"
            if len(usable) - len(first) == 1
            else f"{len(usable) - len(first)} exact copies are"
        )
        source.display.say(f"{said} left out: each image counts once")
    return torch.tensor(list(first.values()), dtype=torch.int64)


def _probe_layers(
    features: Features,
    usable: Tensor,
    labels: Tensor,
    draws: Sequence[ProbeSplit],
    classifiers: Sequence[Classifier],
    on_done: Callable[[], None],
    device: torch.device,
) -> list[ProbeRow]:
    num_classes = int(labels.max()) + 1
    rows: list[ProbeRow] = []
    for layer, whole in zip(features.layers, features.rows, strict=True):
        rows_of_layer = SubsetRows(whole, usable)
        results = probe_layer(rows_of_layer, labels, num_classes, draws, classifiers, on_done, device)
        rows += [ProbeRow(layer, whole.shape[1], result) for result in results]
    return rows


def _draw_curves(
    rows: Sequence[ProbeRow],
    layers: Sequence[Layer],
    kinds: Sequence[Classifier],
    chance: float,
    title: str,
    path: Path,
) -> None:
    curves = {}
    for kind in kinds:
        results = [row.result for row in rows if row.result.classifier == kind]
        curves[str(kind)] = ([result.mean for result in results], [result.std for result in results])
    draw_probe(path, [layer.name for layer in layers], curves, chance, title)
