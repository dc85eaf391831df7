"""Issues of several labels an image, and of numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from statistics import median

from finetune.data.dataset import Dataset, Issue
from finetune.data.layout import some
from finetune.data.quality.classes import FEW_IMAGES
from finetune.data.quality.subject import SHOWN_PATHS
from finetune.errors import count

FAR = 10.0
"""Distance from the median, as a multiple of the median distance, from which a number is reported as far off.
Of normally distributed numbers one in 10^11 is that far."""


def find_label_issues(dataset: Dataset) -> Iterator[Issue]:
    """Yield the issues of labels that single classes do not have."""
    if not dataset.is_labelled:
        return
    if dataset.target.has_classes:
        yield from _find_unlabelled(dataset)
        yield from _find_implied(dataset)
    else:
        yield from _find_far_numbers(dataset)


def _find_unlabelled(dataset: Dataset) -> Iterator[Issue]:
    empty = [one.path for one in dataset.samples if not dataset.target.classes_of(dataset.label_of(one))]
    if empty:
        yield Issue(
            "label-none",
            "note",
            f"{count(len(empty), 'image has', 'images have')} no class.",
            "Keep them if they show none of the classes; remove them if nobody has labelled them.",
            len(empty),
            tuple(empty[:SHOWN_PATHS]),
        )


def _find_implied(dataset: Dataset) -> Iterator[Issue]:
    """Yield the classes whose images all have another class, too."""
    alone, together = Counter[str](), Counter[tuple[str, str]]()
    for sample in dataset.samples:
        names = dataset.target.classes_of(dataset.label_of(sample))
        alone.update(names)
        together.update((one, other) for one in names for other in names if one != other)
    implied = sorted(
        pair for pair, number in together.items() if number == alone[pair[0]] and number >= FEW_IMAGES
    )
    if implied:
        said = [f"{one} ({alone[one]}) always with {other} ({alone[other]})" for one, other in implied]
        yield Issue(
            "label-implied",
            "note",
            f"{count(len(implied), 'class occurs', 'classes occur')} only together with another: "
            f"{some(said)}.",
            "Merge classes that mean the same; a class that includes another needs no mending.",
            len(implied),
        )


def _find_far_numbers(dataset: Dataset) -> Iterator[Issue]:
    values = [float(label) for label in dataset.labels]
    every = [values[sample.label] for sample in dataset.samples]
    middle = median(every)
    usual = median(abs(value - middle) for value in every)
    far = [
        sample
        for sample, value in zip(dataset.samples, every, strict=True)
        if usual and abs(value - middle) > FAR * usual
    ]
    if far:
        said = [f"{dataset.label_of(sample)} ({sample.path})" for sample in far]
        yield Issue(
            "number-far",
            "warning",
            f"{count(len(far), 'number is', 'numbers are')} over {FAR:g} times as far from the median, "
            f"{middle:.4g}, as half of them: {some(said)}.",
            "Correct typing errors and units; the squared error follows the farthest numbers.",
            len(far),
            tuple(sample.path for sample in far[:SHOWN_PATHS]),
        )
