"""The quality report of a dataset: all issues and a summary, for ``check.json`` and the contact sheet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.dataset import SPLITS, Dataset, Issue, sort_issues, to_check
from finetune.data.quality.classes import compute_imbalance, find_class_issues, find_group_issues
from finetune.data.quality.copies import Copies, find_copies, find_copy_issues
from finetune.data.quality.files import Oddities, find_oddities, find_oddity_issues, find_unreadable_issues
from finetune.data.quality.labels import find_label_issues
from finetune.data.quality.near import NearCopies, find_near, find_near_issues
from finetune.data.quality.subject import ScannedDataset
from finetune.data.scan import CheckedImages


@dataclass(frozen=True, eq=False)
class QualityReport:
    """The issues of a dataset, and the images concerned.

    Attributes:
        issues: all issues, errors first.
        summary: statistics of the dataset (:func:`summarise`).
        scanned: the dataset and its scan.
        copies: exact copies.
        near: near copies.
        oddities: unusual images.
    """

    issues: tuple[Issue, ...]
    summary: dict[str, Any]
    scanned: ScannedDataset
    copies: Copies
    near: NearCopies
    oddities: Oddities

    @property
    def errors(self) -> tuple[Issue, ...]:
        """The issues for which a run refuses the dataset."""
        return tuple(issue for issue in self.issues if issue.severity == "error")

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``check.json``."""
        return to_check(self.issues, self.summary)


def inspect_dataset(
    dataset: Dataset, checked: CheckedImages, allow_leaks: bool, known: Sequence[Issue] = ()
) -> QualityReport:
    """Find all issues in a dataset from one scan of its files.

    Args:
        dataset: the dataset with its final splits.
        checked: result of the scan.
        allow_leaks: whether exact copies in two splits are a warning instead of an error.
        known: issues found while the data was read.
    """
    scanned = ScannedDataset(dataset, checked)
    copies, near, oddities = find_copies(scanned), find_near(scanned), find_oddities(scanned)
    issues = [
        *known,
        *find_unreadable_issues(scanned),
        *find_copy_issues(scanned, copies, allow_leaks),
        *find_near_issues(scanned, near),
        *find_group_issues(dataset),
        *find_class_issues(dataset),
        *find_label_issues(dataset),
        *find_oddity_issues(scanned, oddities),
    ]
    return QualityReport(sort_issues(issues), summarise(scanned), scanned, copies, near, oddities)


# --- Statistics of a dataset: sizes, formats, modes, shapes, classes of each split ---


def summarise(scanned: ScannedDataset) -> dict[str, Any]:
    """Return statistics of a dataset as JSON values; docs/check.md describes them."""
    dataset, rows = scanned.dataset, scanned.scan.rows
    indices = range(len(scanned.samples))
    widths, heights = rows["width"].astype(np.float64), rows["height"].astype(np.float64)
    labels = [dataset.label_of(sample) for sample in dataset.samples] if dataset.is_labelled else []
    return {
        "num_images": len(dataset.samples),
        "labels": dataset.target.describe(labels),
        "num_classes": dataset.num_classes,
        "num_unreadable": len(scanned.checked.bad),
        "num_groups": len({sample.group for sample in dataset.samples if sample.group}),
        "val_was_drawn": dataset.val_was_drawn,
        "parts": {
            split: {
                "num_images": len(dataset.of(split)),
                "classes": dict(zip(dataset.classes, dataset.counts(split), strict=True)),
                "imbalance_ratio": compute_imbalance(dataset.counts(split)),
            }
            for split in SPLITS
            if dataset.of(split)
        },
        "formats": _counted(scanned.scan.format_of(index) for index in indices),
        "modes": _counted(scanned.scan.mode_of(index) for index in indices),
        "width": _spread(widths),
        "height": _spread(heights),
        "aspect_ratio": _spread(widths / heights),
        "bytes": _spread(rows["num_bytes"].astype(np.float64)) | {"total": int(rows["num_bytes"].sum())},
    }


def _counted(values: Any) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _spread(values: NDArray[np.float64]) -> dict[str, float | int | None]:
    """Return the smallest, the median and the largest."""
    if not len(values):
        return {"min": None, "median": None, "max": None}
    found = {"min": values.min(), "median": np.median(values), "max": values.max()}
    return {name: round(float(value), 4) for name, value in found.items()}
