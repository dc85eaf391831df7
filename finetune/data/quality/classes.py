"""What class names and numbers of images show: classes too small, alike, or far apart in size."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence

from finetune.data.dataset import Dataset, Issue
from finetune.data.layout import count, some
from finetune.data.quality.subject import SHOWN_PATHS

FEW_IMAGES = 10
"""Training images under which a class is called tiny."""
IMBALANCED = 10.0
"""Largest to smallest class from which the classes are called imbalanced."""
_SHORTEST_TYPO = 6
"""Letters from which one letter more, less or exchanged counts as a slip, and not as another word."""


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
    """Return the size of the largest class over that of the smallest that has images; None without any."""
    there = [number for number in counts if number]
    return max(there) / min(there) if there else None


def find_similar_names(classes: Sequence[str]) -> list[list[str]]:
    """Return classes whose names differ by no more than a slip would.

    Spaces, hyphens and underscores, a plural s, or one letter in a longer word. Names that differ only in
    letter case, or in how an accent is encoded, are found when the data is read.
    """
    by_core: defaultdict[str, list[str]] = defaultdict(list)
    for name in classes:
        by_core[_core(name)].append(name)
    alike = [names for names in by_core.values() if len({_folded(name) for name in names}) > 1]
    cores = sorted(core for core in by_core if core.isalpha() and len(core) >= _SHORTEST_TYPO)
    by_hole: defaultdict[str, set[str]] = defaultdict(set)
    for core in cores:
        for place in range(len(core)):
            by_hole[f"{core[:place]}?{core[place + 1 :]}"].add(core)  # a letter exchanged
            by_hole[core[:place] + core[place + 1 :]].add(core)  # a letter left out
        by_hole[core].add(core)
    slips = {tuple(sorted(near)) for near in by_hole.values() if len(near) > 1}
    alike += [[name for core in near for name in by_core[core]] for near in sorted(slips)]
    return alike


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _core(name: str) -> str:
    """Return what is left of a name without case, separators and a plural s."""
    bare = re.sub(r"(?<!\d)[\s_.\-]+|[\s_.\-]+(?!\d)", "", _folded(name))  # 1.0 is not 10
    return bare[:-1] if len(bare) > 3 and bare.endswith("s") and not bare.endswith("ss") else bare or name


# --- Groups (a patient, a burst, a video) that lie in more than one split ---


def find_group_issues(dataset: Dataset) -> Iterator[Issue]:
    """Yield the issue of groups that lie in several splits; a drawn split never divides one."""
    parts: defaultdict[str, set[str]] = defaultdict(set)
    for sample in dataset.samples:
        if sample.group:
            parts[sample.group].add(sample.split)
    broken = sorted(name for name, found in parts.items() if len(found) > 1)
    if broken:
        torn = frozenset(broken)
        paths = [sample.path for sample in dataset.samples if sample.group in torn]
        yield Issue(
            "group-leak",
            "warning",
            f"{len(broken)} of {count(len(parts), 'group lies', 'groups lie')} in more than one split: "
            f"{some(broken)}.",
            "Move each group into one split, or give no val/: then it is drawn by group.",
            len(broken),
            tuple(paths[:SHOWN_PATHS]),
        )
