"""Probes of one layer: classifiers on its features, as Zeiler and Fergus judge layers (arXiv:1311.2901).

Some images of each class train, the rest are judged by the mean over classes of the share that is right, and
all of it is repeated over draws of the training images.

Shape legend: N labelled images, D features, K classes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from finetune.errors import DataError
from finetune.features.neighbours import classify
from finetune.features.rows import Rows
from finetune.features.solvers import Kind, LinearClassifier, build_training_rows, choose_and_solve
from finetune.runtime import derive_seed

Classifier = Literal["svm", "softmax", "logreg", "knn"]
CLASSIFIERS: tuple[Classifier, ...] = get_args(Classifier)
_KINDS: dict[Classifier, Kind] = {"svm": "svm", "softmax": "softmax", "logreg": "logreg"}
_BLOCK_BYTES = 256 * 2**20
"""Of the features of test images whose scores are computed at a time."""


@dataclass(frozen=True)
class Draw:
    """Training and test images of one repeat: indices into the labelled images."""

    train: Tensor
    test: Tensor
    seed: int


@dataclass(frozen=True)
class ProbeResult:
    """One classifier on one layer.

    Attributes:
        classifier: which.
        accuracies: mean over classes of each repeat, in [0, 1].
        strengths: the C of each repeat; none for nearest neighbours.
    """

    classifier: Classifier
    accuracies: tuple[float, ...]
    strengths: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of the accuracies."""
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float:
        """Standard deviation of the accuracies (of a sample); 0 for a single repeat."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


def draw_parts(labels: Tensor, classes: Sequence[str], per_class: int, seed: int, repeat: int) -> Draw:
    """Draw training images of each class; the others are for testing.

    Args:
        labels: (N,) int64.
        classes: names of the K classes.
        per_class: training images of each.
        seed: of all repeats.
        repeat: which one.

    Raises:
        DataError: there is only one class, or a class has no image to spare for testing.
    """
    if len(classes) < 2:
        found = "there is only one class"
        raise DataError(f"--per-class {per_class}", found, "Give images of two classes or more.")
    counts = labels.bincount(minlength=len(classes))
    smallest = int(counts.argmin())
    if counts[smallest] <= per_class:
        has = f"class {classes[smallest]!r} has {int(counts[smallest])}, and one must be left to judge"
        most = int(counts[smallest]) - 1
        fix = f"Take --per-class {most} at most." if most > 0 else "Add images of this class, or remove it."
        raise DataError(f"--per-class {per_class}", has, fix)
    own = derive_seed(seed, "probe", repeat)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(own))
    mine = [order[labels[order] == label] for label in range(len(classes))]
    train = torch.cat([images[:per_class] for images in mine])
    test = torch.cat([images[per_class:] for images in mine])
    return Draw(train, test, own)


def probe_layer(
    rows: Rows,
    labels: Tensor,
    num_classes: int,
    draws: Sequence[Draw],
    classifiers: Sequence[Classifier],
    on_done: Callable[[], None],
) -> list[ProbeResult]:
    """Judge one layer.

    Args:
        rows: (N, D) of the labelled images.
        labels: (N,) int64.
        num_classes: K.
        draws: of :func:`draw_parts`, one a repeat.
        classifiers: at least one.
        on_done: called after each classifier of each repeat.
    """
    accuracies: dict[Classifier, list[float]] = {kind: [] for kind in classifiers}
    strengths: dict[Classifier, list[float]] = {kind: [] for kind in classifiers}
    for draw in draws:
        own = labels[draw.train]
        linear = [kind for kind in classifiers if kind in _KINDS]
        training = build_training_rows(rows, draw.train, own, num_classes) if linear else None
        for kind in classifiers:
            if training is None or kind not in _KINDS:
                predicted = classify(rows, draw.train, own, draw.test, num_classes)
            else:
                classifier = choose_and_solve(training, _KINDS[kind], draw.seed)
                predicted = _predict(classifier, rows, draw.test)
                strengths[kind].append(classifier.strength)
            accuracies[kind].append(_mean_per_class(predicted, labels[draw.test], num_classes))
            on_done()
    return [ProbeResult(kind, tuple(accuracies[kind]), tuple(strengths[kind])) for kind in classifiers]


def _predict(classifier: LinearClassifier, rows: Rows, indices: Tensor) -> Tensor:
    """Return the classes of rows, (M,) int64."""
    parts = indices.split(max(1, _BLOCK_BYTES // (4 * rows.shape[1])))  # type: ignore[no-untyped-call]
    return torch.cat([classifier.scores(rows[part]).argmax(dim=1).cpu() for part in parts])


def _mean_per_class(predicted: Tensor, labels: Tensor, num_classes: int) -> float:
    """Return the mean recall of the classes that have test images."""
    counts = labels.bincount(minlength=num_classes)
    right = labels[predicted == labels].bincount(minlength=num_classes)
    judged = counts > 0
    return (right[judged].double() / counts[judged]).mean().item()
