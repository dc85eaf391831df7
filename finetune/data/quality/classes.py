"""Issues of classes and groups: tiny classes, similar names, imbalance, groups in several splits."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from finetune.data.dataset import Dataset, Issue
from finetune.data.layout import some
from finetune.data.layouts.class_names import fold_name
from finetune.data.quality.subject import SHOWN_PATHS
from finetune.errors import count

FEW_IMAGES = 10
"""Number of training images below which a class is reported as tiny."""
IMBALANCED = 10.0
"""Ratio of the largest to the smallest class from which imbalance is reported."""
_SHORTEST_TYPO = 6
"""Shortest name in letters for which one extra, missing or different letter counts as a typing error."""


def find_class_issues(dataset: Dataset) -> Iterator[Issue]:
    """Yield the issues of classes that reading the data has not reported already."""
    counts = dataset.counts("train")
    tiny = [name for name, number in zip(dataset.classes, counts, strict=True) if 1 < number < FEW_IMAGES]
    if tiny:
        yield Issue(
            "class-tiny",
            "warning",
            f"{count(len(tiny), 'class has', 'classes have')} fewer than {FEW_IMAGES} training images: "
            f"{some(tiny)}.",
            "Add images of these classes, or merge classes.",
            len(tiny),
        )
    for names in find_similar_names(dataset.classes):
        yield Issue(
            "class-alike",
            "warning",
            f"Classes {some(names)} have nearly the same name, and are trained as different classes.",
            "Merge them if they are the same class.",
            len(names),
        )
    ratio = compute_imbalance(counts)
    if ratio is not None and ratio >= IMBALANCED:
        yield Issue(
            "imbalance",
            "warning",
            f"The largest class has {ratio:.0f} times as many training images as the smallest "
            f"({max(counts)} and {min(number for number in counts if number)}).",
            "Read balanced accuracy, and try --set training.class_weights=balanced.",
        )


def compute_imbalance(counts: Sequence[int]) -> float | None:
    """Return the ratio of the largest class to the smallest that has images; None if none has any."""
    sizes = [number for number in counts if number]
    return max(sizes) / min(sizes) if sizes else None


def find_similar_names(classes: Sequence[str]) -> list[list[str]]:
    """Return the sets of classes whose names differ by no more than a typing error.

    That is: spaces, hyphens and underscores, a plural s, or one letter in a longer word. Names that differ
    only in letter case, or in the encoding of an accent, are reported when the data is read.
    """
    by_core: defaultdict[str, list[str]] = defaultdict(list)
    for name in classes:
        by_core[_core(name)].append(name)
    alike = [names for names in by_core.values() if len({fold_name(name) for name in names}) > 1]
    cores = sorted(core for core in by_core if core.isalpha() and len(core) >= _SHORTEST_TYPO)
    by_hole: defaultdict[str, set[str]] = defaultdict(set)
    for core in cores:
        for index in range(len(core)):
            by_hole[f"{core[:index]}?{core[index + 1 :]}"].add(core)  # a different letter
            by_hole[core[:index] + core[index + 1 :]].add(core)  # a missing letter
        by_hole[core].add(core)
    typos = {tuple(sorted(near)) for near in by_hole.values() if len(near) > 1}
    alike += [[name for core in near for name in by_core[core]] for near in sorted(typos)]
    return alike


def _core(name: str) -> str:
    """Return a name without letter case, separators and a plural s."""
    bare = re.sub(r"(?<!\d)[\s_.\-]+|[\s_.\-]+(?!\d)", "", fold_name(name))  # 1.0 is not 10
    return bare[:-1] if len(bare) > 3 and bare.endswith("s") and not bare.endswith("ss") else bare or name


# --- Groups (a patient, a burst, a video) that lie in more than one split ---


def find_group_issues(dataset: Dataset) -> Iterator[Issue]:
    """Yield an issue if groups lie in several splits, which is possible only with given splits."""
    splits: defaultdict[str, set[str]] = defaultdict(set)
    for sample in dataset.samples:
        if sample.group:
            splits[sample.group].add(sample.split)
    broken = sorted(name for name, found in splits.items() if len(found) > 1)
    if broken:
        divided = frozenset(broken)
        paths = [sample.path for sample in dataset.samples if sample.group in divided]
        yield Issue(
            "group-leak",
            "warning",
            f"{len(broken)} of {count(len(splits), 'group lies', 'groups lie')} in more than one split: "
            f"{some(broken)}.",
            "Move each group into one split, or give no val/: the split is then drawn by group.",
            len(broken),
            tuple(paths[:SHOWN_PATHS]),
        )
