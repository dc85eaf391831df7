"""What the rest of the house knows of a data set: which file, which class, which part."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Sample:
    """One image.

    Attributes:
        path: below ``Dataset.root``, with ``/``.
        label: its class index; -1: none.
        split: its part.
        group: images of one group belong together (a patient, a video); "": it belongs to none.
        fold: in which it is held out, from 1; 0: there are no folds, or it is a test image.
    """

    path: str
    label: int
    split: Split
    group: str = ""
    fold: int = 0


@dataclass(frozen=True)
class Dataset:
    """A list of labelled images that nobody changes; every method gives a new value.

    Attributes:
        root: folder that every ``Sample.path`` is relative to.
        classes: class names in index order, from the training split only; none where nothing is labelled.
        samples: every image, ordered by part (train, val, test) and then by path.
        warnings: what the user should know about the data, one sentence each.
        is_folder: the user named the root itself, and not a CSV file in it.
        val_was_drawn: the validation split was taken from the training images, by chance.
        remarks: the warnings again, for programs, and what a lenient reading left out.
        settled: paths whose parts an earlier attempt drew; they stay.
    """

    root: Path
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]
    warnings: tuple[str, ...] = ()
    is_folder: bool = True
    val_was_drawn: bool = False
    issues: tuple[Issue, ...] = ()
    settled: frozenset[str] = frozenset()

    @property
    def is_labelled(self) -> bool:
        """Whether the images have classes."""
        return bool(self.classes)

    @property
    def num_classes(self) -> int:
        """Number of classes (K)."""
        return len(self.classes)

    def of(self, split: Split) -> tuple[Sample, ...]:
        """Return the images of one split, in order."""
        return tuple(sample for sample in self.samples if sample.split == split)

    def file(self, sample: Sample) -> Path:
        """Return where the image lies on disk."""
        return self.root / sample.path

    def counts(self, split: Split) -> list[int]:
        """Return the number of images per class in one split, in index order, zeros included."""
        counts = [0] * self.num_classes
        for sample in self.of(split):
            counts[sample.label] += 1
        return counts

    @property
    def judged_split(self) -> Split:
        """The part that final metrics come from: test where there is one, else val."""
        return "test" if self.of("test") else "val"

    def without(self, paths: Collection[str]) -> Dataset:
        """Return the same data set less these paths; classes and their indices stay as they are."""
        gone = frozenset(paths)
        return replace(self, samples=tuple(sample for sample in self.samples if sample.path not in gone))


# --- What is worth saying of a data set: one thing found, how often, and what to do about it ---


Severity = Literal["error", "warning", "note"]
"""A run refuses; a run goes on and says so; worth knowing."""


@dataclass(frozen=True)
class Issue:
    """One thing that was found.

    Attributes:
        code: a short name that stays, for programs (docs/check.md lists them).
        severity: what a run does about it.
        message: what was found, one sentence.
        fix: what to do about it, an imperative sentence.
        count: how many images, classes, groups or rows it concerns.
        paths: some of the images.
    """

    code: str
    severity: Severity
    message: str
    fix: str
    count: int = 1
    paths: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {
            "code": self.code,
            "severity": self.severity,
            "count": self.count,
            "message": self.message,
            "fix": self.fix,
            "paths": list(self.paths),
        }


def describe_images(dataset: Dataset, digests: dict[str, str]) -> dict[str, tuple[str, str, str]]:
    """Return label, part and sha256 of every image, by path."""
    return {
        sample.path: (dataset.classes[sample.label], sample.split, digests.get(sample.path, "unreadable"))
        for sample in dataset.samples
    }
