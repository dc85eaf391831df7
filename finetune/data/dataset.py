"""A dataset as all other modules see it: files, labels, splits, and the issues found in it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from finetune.targets import SINGLE, Target

if TYPE_CHECKING:
    from torch import Tensor

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
UNREADABLE = "unreadable"
"""Stands for the sha256 of an image that cannot be read."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image.

    Attributes:
        path: path relative to ``Dataset.root``, with ``/``.
        label: number of its label in ``Dataset.labels``, from 0 (of its class, where each image has one);
            -1 for an image without a label.
        split: the split it belongs to.
        group: name of its group (a patient, a video), which a drawn split never divides; "" for none.
        fold: the fold in which it is held out, from 1; 0 without folds, and for test images.
    """

    path: str
    label: int
    split: Split
    group: str = ""
    fold: int = 0


def sample_order(sample: Sample) -> tuple[int, str]:
    """Return the sort key of ``Dataset.samples``: by split (train, val, test), then by path."""
    return SPLITS.index(sample.split), sample.path


@dataclass(frozen=True)
class Dataset:
    """An immutable list of labelled images; methods that change it return a new dataset.

    Attributes:
        root: the folder that every ``Sample.path`` is relative to.
        classes: names of the network's outputs in index order, from the training split only: the classes;
            empty if no image is labelled.
        samples: every image, ordered by split (train, val, test) and then by path.
        warnings: what the user should know about the data, one sentence each.
        is_folder: whether the user named the root itself, and not a CSV file in it.
        val_was_drawn: whether the validation split was taken from the training images, by chance.
        issues: the warnings in structured form, and the errors that a lenient reader has collected.
        settled: paths whose split an earlier attempt drew; they keep it.
        target: what the labels are.
        label_texts: every label that an image has, where labels are not classes.
    """

    root: Path
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]
    warnings: tuple[str, ...] = ()
    is_folder: bool = True
    val_was_drawn: bool = False
    issues: tuple[Issue, ...] = ()
    settled: frozenset[str] = frozenset()
    target: Target = SINGLE
    label_texts: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels as text, by their numbers: the classes, sets of classes (``cat|dog``), or numbers."""
        return self.label_texts or self.classes

    def label_of(self, sample: Sample) -> str:
        """Return the label of an image as text."""
        return self.labels[sample.label]

    def evaluated(self, samples: Sequence[Sample]) -> list[tuple[str, str]]:
        """Return path and label of images, as tables of predictions name them."""
        return [(sample.path, self.labels[sample.label]) for sample in samples]

    def encode(self, samples: Sequence[Sample]) -> Tensor:
        """Return the labels of images as training takes them (:meth:`finetune.targets.Target.encode`).

        Images without labels have -1, (N,) int64.
        """
        if not self.is_labelled:
            import torch

            return torch.tensor([sample.label for sample in samples])
        return self.target.encode([self.labels[sample.label] for sample in samples], self.classes)

    @property
    def is_labelled(self) -> bool:
        """Whether the images have classes."""
        return bool(self.classes)

    @property
    def num_classes(self) -> int:
        """Number of classes, or outputs (K)."""
        return len(self.classes)

    def of(self, split: Split) -> tuple[Sample, ...]:
        """Return the images of one split, in order."""
        return tuple(sample for sample in self.samples if sample.split == split)

    def file(self, sample: Sample) -> Path:
        """Return the image's path on disk."""
        return self.root / sample.path

    def counts(self, split: Split) -> list[int]:
        """Return the number of images per class in one split, in index order, zeros included."""
        index = {name: number for number, name in enumerate(self.classes)}
        numbers = [[index[name] for name in self.target.classes_of(label)] for label in self.labels]
        counts = [0] * self.num_classes
        for sample in self.of(split):
            for number in numbers[sample.label]:
                counts[number] += 1
        return counts

    @property
    def eval_split(self) -> Split:
        """The split that the final metrics are computed on: test if there is one, else val."""
        return "test" if self.of("test") else "val"

    def without(self, paths: Collection[str]) -> Self:
        """Return the dataset without the images at these paths; classes and their indices do not change."""
        gone = frozenset(paths)
        return replace(self, samples=tuple(sample for sample in self.samples if sample.path not in gone))

    def prepared(
        self,
        digests: Mapping[str, str],
        unreadable: Collection[BadImage] = (),
        value_range: tuple[float, float] | None = None,
    ) -> PreparedDataset:
        """Return the dataset together with what reading its files has shown."""
        own = {field.name: getattr(self, field.name) for field in fields(Dataset)}
        return PreparedDataset(**own, digests=digests, unreadable=tuple(unreadable), value_range=value_range)


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be decoded, and why."""

    path: str
    split: Split
    reason: str


@dataclass(frozen=True, kw_only=True)
class PreparedDataset(Dataset):
    """A dataset whose files were read, with its final splits.

    Attributes:
        digests: SHA-256 of each file that could be read, by path.
        unreadable: the images that cannot be read.
        value_range: the values that become black and white in training images of more than 8 bits; None if
            there are none.
    """

    digests: Mapping[str, str]
    unreadable: tuple[BadImage, ...] = ()
    value_range: tuple[float, float] | None = None

    @property
    def readable(self) -> PreparedDataset:
        """The dataset without its unreadable images, which stay listed."""
        own = {sample.path for sample in self.samples}
        bad = tuple(image for image in self.unreadable if image.path in own)
        return replace(self.without({image.path for image in bad}), unreadable=bad)


# --- Issues ---

Severity = Literal["error", "warning", "note"]
"""``error``: a run refuses the data. ``warning``: a run reports it and continues. ``note``: information."""


@dataclass(frozen=True)
class Issue:
    """One issue found in a dataset, with the number of images, classes, groups or rows it concerns.

    Attributes:
        code: stable short name, for programs (docs/check.md lists them).
        severity: what a run does about it.
        message: what was found, one sentence.
        fix: what to do about it, an imperative sentence.
        count: number of images, classes, groups or rows concerned.
        paths: paths of some of the images.
    """

    code: str
    severity: Severity
    message: str
    fix: str
    count: int = 1
    paths: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the issue as JSON values."""
        return {
            "code": self.code,
            "severity": self.severity,
            "count": self.count,
            "message": self.message,
            "fix": self.fix,
            "paths": list(self.paths),
        }


_ORDER = ("error", "warning", "note")


def to_check(issues: Sequence[Issue], summary: dict[str, Any]) -> dict[str, Any]:
    """Return the content of ``check.json``."""
    numbers = {severity: sum(issue.severity == severity for issue in issues) for severity in _ORDER}
    return {
        "errors": numbers["error"],
        "warnings": numbers["warning"],
        "notes": numbers["note"],
        "findings": [issue.to_dict() for issue in sort_issues(issues)],
        "summary": summary,
    }


def sort_issues(issues: Sequence[Issue]) -> tuple[Issue, ...]:
    """Return issues with errors first and notes last."""
    return tuple(sorted(issues, key=lambda issue: _ORDER.index(issue.severity)))


def describe_images(dataset: Dataset, digests: Mapping[str, str]) -> dict[str, tuple[str, str, str]]:
    """Return label, split and SHA-256 of every image, by path."""
    return {
        sample.path: (dataset.label_of(sample), sample.split, digests.get(sample.path, UNREADABLE))
        for sample in dataset.samples
    }
