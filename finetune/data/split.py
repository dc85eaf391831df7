"""Draw the validation split, or folds, from the training images, the same way on every machine.

The order of images comes from a hash of seed, class and path, so neither the order of a directory listing nor
the version of a random generator can move an image to another split. The units that are drawn are groups of
images that belong together, and single images. Exact copies are known only after the files were read; the
split is then drawn again, with copies as units.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from finetune.data.dataset import Dataset, Sample, sample_order
from finetune.data.layout import LayoutReader, quoted, some
from finetune.errors import DataError, UsageError
from finetune.recipe import Recipe

Groups = Mapping[str, str]


@dataclass(frozen=True)
class SplitConfig:
    """How the validation split is drawn from the training images.

    Attributes:
        val_fraction: share of each class to validate on, 0 < val_fraction < 1.
        seed: seed of the draw.
        group_by: a column of the CSV file, or a regular expression on the path, that gives the group of an
            image; a group stays in one split.
        folds: number of folds that the training and validation images are dealt into; None draws a fraction.
        fold: the fold that is the validation split, from 1.
    """

    val_fraction: float
    seed: int
    group_by: str | None = None
    folds: int | None = None
    fold: int | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> SplitConfig:
        """Return the configuration of a recipe."""
        data = recipe.data
        return cls(data.val_fraction, recipe.seed, data.group_by, data.folds, data.fold)

    def check_fold(self) -> None:
        """Refuse a fold that does not exist.

        Raises:
            UsageError: ``fold`` is larger than ``folds``, or one of the two is missing.
        """
        if (self.folds is None) != (self.fold is None) or (self.fold or 1) > (self.folds or 1):
            found = f"data.fold is {'not given' if self.fold is None else self.fold}"
            fix = "Give both: --set data.folds=5 --set data.fold=1, up to 5."
            raise UsageError(f"data.folds={self.folds}", found, fix)


@dataclass(frozen=True)
class Unit:
    """Images that are drawn together.

    Attributes:
        name: name of the group, or path of a single image.
        paths: paths of the images.
        counts: number of images by class.
    """

    name: str
    paths: tuple[str, ...]
    counts: Mapping[str, int]

    def key(self, seed: int) -> tuple[bytes, str]:
        """Return a sort key that gives a pseudo-random order; it depends only on seed, class and name."""
        return sha256(f"{seed}/{min(self.counts)}/{self.name}".encode()).digest(), self.name


def build_units(paths_by_class: Mapping[str, Sequence[str]], groups: Groups) -> list[Unit]:
    """Return the groups, and the images without a group, as units; an image may be of several classes."""
    members: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    alone: dict[str, Counter[str]] = {}
    for name, paths in paths_by_class.items():
        for path in paths:
            if path in groups:
                members[groups[path]].append((path, name))
            else:
                alone.setdefault(path, Counter())[name] += 1
    return [Unit(path, (path,), counts) for path, counts in alone.items()] + [
        Unit(group, tuple(sorted({path for path, _ in own})), Counter(label for _, label in own))
        for group, own in members.items()
    ]


def find_indivisible(paths_by_class: Mapping[str, Sequence[str]], groups: Groups) -> list[str]:
    """Return the classes whose images are all in one unit, so that they cannot be in two splits."""
    units_of: Counter[str] = Counter()
    for unit in build_units(paths_by_class, groups):
        units_of.update(unit.counts.keys())
    return sorted(name for name, number in units_of.items() if number == 1)


def split_off(
    paths_by_class: Mapping[str, Sequence[str]], fraction: float, seed: int, groups: Groups | None = None
) -> set[str]:
    """Return the paths that become validation images, balanced over the classes as far as groups allow.

    Args:
        paths_by_class: the training paths of each class, in any order.
        fraction: share of each class to take, 0 < fraction < 1.
        seed: seed of the draw.
        groups: group of each image, by path; a group is taken as a whole or not at all.

    Of n images of a class ``round(n * fraction)`` are taken, at least one, and at least one is left;
    a class with a single image therefore keeps it for training. With groups, and where images are of several
    classes, a greedy search comes as close to these numbers as it can.
    """
    total = {name: len(paths) for name, paths in paths_by_class.items()}
    wanted = {name: max(1, round(number * fraction)) for name, number in total.items()}
    have: Counter[str] = Counter()
    taken: set[str] = set()
    units = sorted(build_units(paths_by_class, groups or {}), key=lambda unit: unit.key(seed))
    has_several = sum(total.values()) > len({path for paths in paths_by_class.values() for path in paths})

    def take(unit: Unit) -> None:
        have.update(unit.counts)
        taken.update(unit.paths)

    def leaves_some(unit: Unit) -> bool:
        return all(have[name] + number < total[name] for name, number in unit.counts.items())

    def rarest(unit: Unit) -> str:
        return min(unit.counts, key=lambda name: (total[name], name))

    if has_several:
        # The rarest class comes first and decides, while common ones still have room (iterative
        # stratification; Sechidis et al., ECML PKDD 2011).
        units.sort(key=lambda unit: (total[rarest(unit)], rarest(unit)))
    for unit in units:
        names = [rarest(unit)] if has_several else unit.counts.keys()
        now = sum(abs(wanted[name] - have[name]) for name in names)
        then = sum(abs(wanted[name] - have[name] - unit.counts[name]) for name in names)
        if then < now and leaves_some(unit):
            take(unit)
    for name in sorted(total):  # classes whose groups are all larger than twice the wanted number
        if have[name]:
            continue
        if own := [unit for unit in units if name in unit.counts and leaves_some(unit)]:
            take(min(own, key=lambda unit: len(unit.paths)))
    return taken


def draw_folds(
    paths_by_class: Mapping[str, Sequence[str]], num_folds: int, seed: int, groups: Groups | None = None
) -> dict[str, int]:
    """Return the fold of each path, from 1: classes are spread evenly, and groups stay whole.

    The largest units are assigned first, each to the fold that has the fewest images of its classes.
    """
    total = {name: len(paths) for name, paths in paths_by_class.items()}
    have = [Counter[str]() for _ in range(num_folds)]
    sizes = [0] * num_folds
    folds: dict[str, int] = {}
    units = build_units(paths_by_class, groups or {})
    for unit in sorted(units, key=lambda unit: (-len(unit.paths), unit.key(seed))):
        held = [sum(n * own[name] / total[name] for name, n in unit.counts.items()) for own in have]
        fold = min(range(num_folds), key=lambda number: (held[number], sizes[number], number))
        have[fold].update(unit.counts)
        sizes[fold] += len(unit.paths)
        folds.update(dict.fromkeys(unit.paths, fold + 1))
    return folds


FOLD_FIX = "Take fewer folds, or add images of other groups."


def find_fold_fault(
    paths_by_class: Mapping[str, Sequence[str]], folds: Mapping[str, int], num_folds: int
) -> str | None:
    """Return why a fold cannot be held out (it is empty, or has every image of a class), or None."""
    if len(set(folds.values())) < num_folds:
        return f"there are only {len(set(folds.values()))} images or groups"
    for name, paths in sorted(paths_by_class.items()):
        own = {folds[path] for path in paths}
        if len(own) == 1:
            return f"fold {own.pop()} has every image of class {name!r}"
    return None


# --- Exact copies ---


def keep_copies_together(
    dataset: Dataset, digests: Mapping[str, str], config: SplitConfig
) -> tuple[Dataset, int]:
    """Return a dataset in which exact copies lie in one split, and the number of images that moved.

    If there are copies, the split is drawn again, with copies (and the groups that they join) as units;
    otherwise it stays the same. If an earlier attempt drew the split, its images stay, and a new image
    joins the split of its copies.

    Args:
        dataset: a dataset whose validation split was drawn; test images stay as they are.
        digests: SHA-256 of each image, by path; images without one have no copies.
        config: settings of the draw.

    Raises:
        DataError: too few different images are left for a split, a fold or a class.
    """
    pool = [sample for sample in dataset.samples if sample.split != "test"]
    units = _name_units(pool, digests)
    if units is None:
        return dataset, 0
    if dataset.settled:
        return _join_settled(dataset, pool, units)
    by_label: dict[str, list[str]] = {name: [] for name in dataset.labels}
    for sample in pool:
        by_label[dataset.label_of(sample)].append(sample.path)
    paths = dataset.target.strata(by_label)
    folds: dict[str, int] = {}
    if num_folds := max(sample.fold for sample in pool):
        folds = draw_folds(paths, num_folds, config.seed, units)
        if fault := find_fold_fault(paths, folds, num_folds):
            raise DataError(f"data in {dataset.root}", f"without copies, {fault}", FOLD_FIX)
        held_out = next((sample.fold for sample in pool if sample.split == "val"), 1)
        taken = {path for path, fold in folds.items() if fold == held_out}
    else:
        taken = split_off(paths, config.val_fraction, config.seed, units)
    if not taken:
        found = (
            "all images of each class are copies of one image, or of one group: none is left for validation"
        )
        raise DataError(f"data in {dataset.root}", found, "Add other images.")
    return _assign(dataset, taken, folds)


def _join_settled(dataset: Dataset, pool: Sequence[Sample], units: Mapping[str, str]) -> tuple[Dataset, int]:
    """Move new images to the split of their copies, so that no copy of a training image is tested on."""
    leaders: dict[str, Sample] = {}
    for sample in pool:  # training images come first
        if sample.path in dataset.settled and sample.path in units:
            leaders.setdefault(units[sample.path], sample)
    leader_of = {
        sample.path: leaders.get(units.get(sample.path, ""), sample)
        for sample in pool
        if sample.path not in dataset.settled
    }
    leading = {sample.path: leader_of.get(sample.path, sample) for sample in pool}
    taken = {path for path, leader in leading.items() if leader.split == "val"}
    return _assign(dataset, taken, {path: leader.fold for path, leader in leading.items()})


def _assign(dataset: Dataset, taken: Collection[str], folds: Mapping[str, int]) -> tuple[Dataset, int]:
    """Return the dataset with these paths as validation split, and the number of images that moved."""
    samples = [
        sample
        if sample.split == "test"
        else replace(sample, split="val" if sample.path in taken else "train", fold=folds.get(sample.path, 0))
        for sample in dataset.samples
    ]
    moved = sum(new.split != old.split for new, old in zip(samples, dataset.samples, strict=True))
    samples.sort(key=sample_order)
    return replace(dataset, samples=tuple(samples)), moved


def _name_units(pool: Sequence[Sample], digests: Mapping[str, str]) -> dict[str, str] | None:
    """Return the unit of each image that has copies or a group, by path; None if there are no copies.

    A unit has the name of its group, or else of its first image, so that the order of all other units stays.
    """
    copies = Counter(digests[sample.path] for sample in pool if sample.path in digests)
    if not pool or max(copies.values(), default=1) < 2:
        return None
    units = (unit for unit in join_copies(pool, digests) if len(unit) > 1 or unit[0].group)
    return {
        sample.path: min((member.group for member in unit if member.group), default=unit[0].path)
        for unit in units
        for sample in unit
    }


def join_copies(pool: Sequence[Sample], digests: Mapping[str, str]) -> list[list[Sample]]:
    """Return the connected sets of images; a common group or equal content links two images."""
    above: dict[str, str] = {}

    def top(name: str) -> str:
        while (higher := above.get(name, name)) != name:
            above[name] = name = above.get(higher, higher)
        return name

    for sample in pool:
        names = [f"path {sample.path}"]
        names += [f"group {sample.group}"] if sample.group else []
        names += [f"sha256 {digests[sample.path]}"] if sample.path in digests else []
        for name in names[1:]:
            above[top(name)] = top(names[0])
    joined: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in sorted(pool, key=lambda sample: sample.path):
        joined[top(f"path {sample.path}")].append(sample)
    return list(joined.values())


# --- Groups: images that belong together (a patient, a burst, a video) and stay in one split ---
#
# Groups are named by a column of the CSV file (``data/table.py``) or by a regular expression on the path.


_MANY = 10
"""Number of repetitions from which a fixed repetition is treated like an open one."""
_REPEATS = frozenset({"MAX_REPEAT", "MIN_REPEAT"})


def find_groups(reader: LayoutReader, group_by: str | None) -> dict[str, str]:
    """Return the group of each image that belongs to one, by path.

    A column of the CSV file takes precedence over a regular expression. The expression is searched for in the
    path below the data folder; its first group (or the whole match, if it has none) names the image's group.

    Raises:
        DataError: the regular expression is invalid, may take for ever, or matches no path; or the column is
            empty.
    """
    if group_by is None:
        return {}
    paths = [path for by_class in reader.splits.values() for own in by_class.values() for path in own]
    is_column = reader.group_column is not None
    groups = _match(_compile(group_by), paths) if reader.group_column is None else reader.group_column
    if not groups and not is_column:
        found = f"it matches none of {len(paths)} image paths, for example {some(sorted(paths)[:2])}"
        fix = "Write a regular expression that matches the paths, or name a column of the CSV file."
        raise DataError(f"--group-by {quoted(group_by)}", found, fix)
    if loose := sorted(path for path in paths if path not in groups):
        reader.warn(
            "group-missing",
            f"{len(loose)} of {len(paths)} images belong to no group and are drawn individually: "
            f"{some(loose)}.",
            "Fill in the column if they should have one."
            if is_column
            else "Correct --group-by if they should have one.",
            len(loose),
            loose,
        )
    return groups


def _compile(pattern: str) -> re.Pattern[str]:
    asked = f"--group-by {quoted(pattern)}"
    try:
        compiled, parsed = re.compile(pattern), _parser.parse(pattern)
        if _repeats_choice(parsed, False):
            found = "it repeats a repetition or a choice, so that matching may never end"
            raise DataError(asked, found, "Write, for example, [0-9]+ instead of ([0-9]+)+ or ([0-9]|x)+.")
        return compiled
    except (re.error, RecursionError, OverflowError) as error:
        found = f"it is not a regular expression ({error})"
        raise DataError(
            asked, found, r"Write one that matches the group in a path, such as 'patient(\d+)'."
        ) from None


def _repeats_choice(node: Any, is_repeated: bool) -> bool:
    """Return whether a parsed expression repeats a part that can match in more than one way.

    ``(a+)+`` and ``(a|a)+`` can match in exponentially many ways. The test is not complete: ``a*a*a*a*x`` is
    slow as well.
    """
    if isinstance(node, tuple) and len(node) == 2 and str(node[0]) in _REPEATS:
        least, most, inner = node[1]
        is_open = int(most) > int(least)
        is_repetition = (is_open and int(most) > 1) or int(most) >= _MANY
        return (is_repeated and is_open) or _repeats_choice(list(inner), is_repeated or is_repetition)
    if isinstance(node, tuple) and len(node) == 2 and str(node[0]) == "BRANCH" and is_repeated:
        return True
    is_many = isinstance(node, tuple | list | _parser.SubPattern)
    return is_many and any(_repeats_choice(child, is_repeated) for child in node)


def _match(pattern: re.Pattern[str], paths: Iterable[str]) -> dict[str, str]:
    groups = {}
    for path in paths:
        if found := pattern.search(path):
            name = found.group(1) if pattern.groups else found.group()
            if name:
                groups[path] = name
    return groups
