"""``finetune probe``: classifiers on the features of layers, as in Zeiler and Fergus (arXiv:1311.2901).

Some images of each class train and the rest test; the score is the mean accuracy over classes. Of several
labels an image it is the mean average precision, of numbers R squared, and some of each range train. This is
repeated over random draws of the training images.

Shape legend: N labelled images, D features, K classes.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from finetune.data.dataset import Dataset, Sample
from finetune.data.prepare import check_outside, require_labels
from finetune.errors import DataError, UsageError, suggest
from finetune.features.extraction import Features, Source, open_features, open_images, open_source
from finetune.features.network import open_network, take_channels
from finetune.features.rows import Rows, SubsetRows
from finetune.features.solvers import Kind, LinearClassifier, build_training_rows, choose_and_solve, fit
from finetune.features.transferability import vote
from finetune.plots.features import draw_probe
from finetune.recipe import Recipe
from finetune.runs.files import write_csv
from finetune.runs.new_folder import new_folder
from finetune.runs.outcome import translated_errors
from finetune.system.device import derive_seed
from finetune.system.display import Display
from finetune.targets import METRIC_NAMES, SINGLE, Target, TargetKind, decide
from pretrained.graph.layers import Layer
from pretrained.graph.pooling import Pool

Classifier = Literal["svm", "softmax", "logreg", "ridge", "knn"]
CLASSIFIERS: tuple[Classifier, ...] = get_args(Classifier)
_KINDS: dict[Classifier, Kind] = {"svm": "svm", "softmax": "softmax", "logreg": "logreg", "ridge": "ridge"}
_FITTING: dict[TargetKind, tuple[Classifier, ...]] = {
    "single": ("svm", "softmax", "logreg", "knn"),
    "multi": ("logreg", "knn"),
    "number": ("ridge", "knn"),
}
"""The classifiers that can predict labels of a kind."""
_USUAL: dict[TargetKind, tuple[Classifier, ...]] = _FITTING | {"single": ("svm", "softmax", "knn")}
_ADD_IMAGES = "Add images of this class, or remove it."
_BLOCK_BYTES = 256 * 2**20
"""Bytes of features of test images that are scored at a time."""


def read_classifiers(words: Sequence[str]) -> list[Classifier]:
    """Return the named classifiers without duplicates.

    Raises:
        UsageError: a name is unknown.
    """
    known = {str(kind): kind for kind in CLASSIFIERS}
    for word in words:
        if word not in known:
            found = f"there is no such classifier{suggest(word, known)}"
            raise UsageError(f"--classifiers {word}", found, f"Choose {', '.join(known)}.")
    return [known[word] for word in dict.fromkeys(words)]


def choose_classifiers(asked: Sequence[Classifier], target: Target) -> list[Classifier]:
    """Return the classifiers that were asked for; of none, those that labels of a kind usually have.

    Raises:
        UsageError: one cannot predict such labels.
    """
    fitting = _FITTING[target.kind]
    for name in asked:
        if name not in fitting:
            found = f"it does not predict {METRIC_NAMES[target.score]}"
            raise UsageError(f"--classifiers {name}", found, f"Choose {', '.join(fitting)}.")
    return [*asked] or [*_USUAL[target.kind]]


@dataclass(frozen=True)
class ProbeSplit:
    """Training and test images of one repeat: indices (int64) into the labelled images, and a seed."""

    train: Tensor
    test: Tensor
    seed: int


@dataclass(frozen=True)
class ProbeResult:
    """The scores of one classifier on one layer.

    Attributes:
        classifier: its kind.
        scores: of each repeat: mean accuracy over classes in [0, 1], mean average precision, or R squared.
        strengths: the C of each repeat; empty for nearest neighbours.
    """

    classifier: Classifier
    scores: tuple[float, ...]
    strengths: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean of the scores over repeats."""
        return statistics.fmean(self.scores)

    @property
    def std(self) -> float:
        """Sample standard deviation of the scores over repeats; 0 for a single repeat."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0


def draw_probe_split(
    strata: Mapping[str, Sequence[int]], number: int, per_class: int, seed: int, repeat: int
) -> ProbeSplit:
    """Draw training images of each class, or range of numbers; the others are test images.

    Args:
        strata: indices of the images of each class or range; an image may be in several, or in none.
        number: of images (N).
        per_class: training images of each of them.
        seed: the seed of all repeats.
        repeat: index of the repeat.

    Raises:
        DataError: there is only one class, or a class has no image left for testing.
    """
    if len(strata) < 2:
        found = "there is only one class"
        raise DataError(f"--per-class {per_class}", found, "Give images of two classes or more.")
    name = min(strata, key=lambda name: len(strata[name]))
    fewest = len(strata[name])
    if fewest <= per_class:
        has = f"class {name!r} has {fewest}, and one must be left for testing"
        fix = f"Use --per-class {fewest - 1} or fewer." if fewest > 1 else _ADD_IMAGES
        raise DataError(f"--per-class {per_class}", has, fix)
    own = derive_seed(seed, "probe", repeat)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(own)).tolist()
    mine = [[index for index in order if index in members] for members in map(set, strata.values())]
    train = dict.fromkeys(index for images in mine for index in images[:per_class])
    test = [index for index in order if index not in train]
    if not test:
        raise DataError(f"--per-class {per_class}", "no image is left for testing", "Use a lower number.")
    return ProbeSplit(torch.tensor([*train]), torch.tensor(test), own)


def probe_layer(
    rows: Rows,
    labels: Tensor,
    num_classes: int,
    draws: Sequence[ProbeSplit],
    classifiers: Sequence[Classifier],
    on_done: Callable[[], None],
    device: torch.device,
    target: Target = SINGLE,
) -> list[ProbeResult]:
    """Train and test classifiers on the features of one layer.

    Args:
        rows: features (N, D) of the labelled images.
        labels: (N,) int64, or (N, K) float32, as ``target`` encodes them.
        num_classes: K.
        draws: the splits by :func:`draw_probe_split`, one a repeat.
        classifiers: the kinds, at least one.
        on_done: called after each classifier of each repeat.
        device: device that solves the linear classifiers.
        target: what the labels are.
    """
    scores: dict[Classifier, list[float]] = {kind: [] for kind in classifiers}
    strengths: dict[Classifier, list[float]] = {kind: [] for kind in classifiers}
    for draw in draws:
        own = labels[draw.train]
        linear = [kind for kind in classifiers if kind not in ("knn", "ridge")]
        training = build_training_rows(rows, draw.train, own, num_classes, device) if linear else None
        for kind in classifiers:
            if kind == "knn":
                outputs = vote(rows, draw.train, own, draw.test, num_classes)
            else:
                classifier = (
                    fit(rows, draw.train, own, num_classes, _KINDS[kind], draw.seed, device)
                    if training is None
                    else choose_and_solve(training, _KINDS[kind], draw.seed)
                )
                outputs = _predict(classifier, rows, draw.test)
                strengths[kind].append(classifier.strength)
            scores[kind].append(_score(outputs, labels[draw.test], target))
            on_done()
    return [ProbeResult(kind, tuple(scores[kind]), tuple(strengths[kind])) for kind in classifiers]


def _predict(classifier: LinearClassifier, rows: Rows, indices: Tensor) -> Tensor:
    """Return the outputs of M rows, (M, K) float32."""
    parts = indices.split(max(1, _BLOCK_BYTES // (4 * rows.shape[1])))  # type: ignore[no-untyped-call]
    return torch.cat([classifier.scores(rows[part]) for part in parts])


def _score(outputs: Tensor, labels: Tensor, target: Target) -> float:
    """Return the mean recall of the classes that have test images, or the score of other labels."""
    from sklearn.metrics import recall_score

    if target != SINGLE:
        return target.compute_score(outputs, labels)
    return float(recall_score(labels, decide(outputs), labels=np.unique(labels), average="macro"))


# --- the command ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeRow:
    """One classifier on one layer.

    Attributes:
        layer: the layer.
        num_features: features per image.
        result: its scores.
        metric: what they are: ``accuracy`` (the mean over classes), ``map`` or ``r2``.
    """

    layer: Layer
    num_features: int
    result: ProbeResult
    metric: str = "accuracy"

    def to_dict(self, per_class: int) -> dict[str, Any]:
        """Return the row of ``probe.csv`` by column name."""
        result = self.result
        return {
            "layer": self.layer.name,
            "depth": self.layer.share,
            "num_features": self.num_features,
            "classifier": result.classifier,
            f"mean_{self.metric}": result.mean,
            f"std_{self.metric}": result.std,
            "per_class": per_class,
            "repeats": len(result.scores),
            "regularisation": " ".join(f"{strength:g}" for strength in result.strengths),
        }


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
    """Compare layers by the score of linear classifiers and nearest neighbours on their features.

    All labelled images are used, of any split. In each repeat some images of each class train and the rest
    test.

    Args:
        recipe: settings of backbone, data, input, cache, machine and seed.
        wanted: names, keywords and patterns of layers.
        per_class: training images of each class.
        classifiers: the kinds; empty for those that the labels usually have.
        repeats: number of random draws of training images.
        output: a new folder for ``probe.csv`` and ``probe.png``.
        pool: how a layer's output becomes a row.
        display: shows progress.

    Raises:
        FinetuneError: the command fails; the subclass gives the exit code (docs/errors.md).
    """
    with translated_errors():
        dataset = open_images(recipe, display)
        require_labels(dataset, recipe)
        chosen = choose_classifiers(classifiers, dataset.target)
        recipe = take_channels(recipe, dataset)
        network = open_network(recipe, display)
        layers = network.layers.select(wanted, pool)
        check_outside(output, dataset)
        strata = _find_strata(dataset, dataset.samples)
        draw_probe_split(strata, len(dataset.samples), per_class, recipe.seed, 0)  # raises early
        source = open_source(recipe, network, dataset, display)
        with new_folder(output) as folder:
            samples = source.dataset.samples
            with open_features(source, layers, pool) as features:
                usable = leave_copies_out(features.usable(samples), source)
                own = [samples[index] for index in usable.tolist()]
                strata = _find_strata(dataset, own)
                draws = [
                    draw_probe_split(strata, len(own), per_class, recipe.seed, repeat)
                    for repeat in range(repeats)
                ]
                total = len(layers) * len(chosen) * repeats
                with display.track("probing layers", total) as advance:
                    rows = _probe_layers(
                        features,
                        usable,
                        dataset.encode(own),
                        draws,
                        chosen,
                        lambda: advance(1, ""),
                        network.placement.device,
                        dataset,
                    )
            table = [row.to_dict(per_class) for row in rows]
            write_csv(folder / "probe.csv", [tuple(row.values()) for row in table], tuple(table[0]))
            title = f"{network.backbone.card.name}, {per_class} training images a class"
            _draw_curves(rows, layers, chosen, _find_chance(dataset, own), title, folder / "probe.png")
        display.say(f"{output}/probe.csv, probe.png", style="bold")
        return rows


def _find_strata(dataset: Dataset, samples: Sequence[Sample]) -> dict[str, list[int]]:
    """Return the places of images by class in index order, or by range of numbers."""
    target, places = dataset.target, defaultdict[str, list[str]](list)
    for place, sample in sorted(enumerate(samples), key=lambda pair: pair[1].label):
        places[dataset.label_of(sample)].append(str(place))
    found = target.strata(places)
    names = dataset.classes if target.has_classes else tuple(found)
    return {name: [*map(int, found.get(name, ()))] for name in names}


def _find_chance(dataset: Dataset, samples: Sequence[Sample]) -> float:
    """Return the score of a predictor that sees no image."""
    labels = dataset.encode(samples)
    if labels.ndim == 1:
        return 1 / dataset.num_classes
    return dataset.target.compute_score(torch.zeros_like(labels), labels)


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
    dataset: Dataset,
) -> list[ProbeRow]:
    number, target = dataset.num_classes, dataset.target
    rows: list[ProbeRow] = []
    for layer, whole in zip(features.layers, features.rows, strict=True):
        rows_of_layer = SubsetRows(whole, usable)
        results = probe_layer(rows_of_layer, labels, number, draws, classifiers, on_done, device, target)
        rows += [ProbeRow(layer, whole.shape[1], result, target.score) for result in results]
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
    metric = METRIC_NAMES[rows[0].metric]
    draw_probe(path, [layer.name for layer in layers], curves, chance, title, metric)
