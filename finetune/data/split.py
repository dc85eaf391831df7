"""Draw the validation part, or folds, from the training images, the same way on every machine.

The order of images comes from a hash of seed, class and path, so neither the order in which a file system
lists them nor the library version of a random generator can move an image across. What is drawn are units: a
group of images that belong together, or an image by itself. Exact copies are known only once the files were
read; then they are brought to one side.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

from finetune.data.sample import SPLITS, Dataset, Sample
from finetune.errors import DataError

Groups = Mapping[str, str]


@dataclass(frozen=True)
class Unit:
    """Images that are drawn together.

    Attributes:
        name: of the group, or the path of an image by itself.
        paths: of the images.
        counts: images by class.
    """

    name: str
    paths: tuple[str, ...]
    counts: Mapping[str, int]

    def key(self, seed: int) -> tuple[bytes, str]:
        """Return a place in the order: random to look at, but a function of names alone."""
        return sha256(f"{seed}/{min(self.counts)}/{self.name}".encode()).digest(), self.name


def build_units(paths_by_class: Mapping[str, Sequence[str]], groups: Groups) -> list[Unit]:
    """Return groups, and images that belong to none, as units."""
    members: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    units = []
    for name, paths in paths_by_class.items():
        for path in paths:
            if path in groups:
                members[groups[path]].append((path, name))
            else:
                units.append(Unit(path, (path,), {name: 1}))
    return units + [
        Unit(group, tuple(sorted(path for path, _ in own)), Counter(label for _, label in own))
        for group, own in members.items()
    ]


def find_undividable(paths_by_class: Mapping[str, Sequence[str]], groups: Groups) -> list[str]:
    """Return the classes whose images all lie in one unit: they cannot be both trained on and judged."""
    held: Counter[str] = Counter()
    for unit in build_units(paths_by_class, groups):
        held.update(unit.counts.keys())
    return sorted(name for name, number in held.items() if number == 1)


def split_off(
    paths_by_class: Mapping[str, Sequence[str]], fraction: float, seed: int, groups: Groups | None = None
) -> set[str]:
    """Return the paths that become validation images, as evenly over the classes as groups allow.

    Args:
        paths_by_class: the training paths of each class, in any order.
        fraction: share of each class to take, 0 < fraction < 1.
        seed: another seed gives another choice.
        groups: by path; the images of a group are taken together or not at all.

    Of n images of a class ``round(n * fraction)`` are taken, at least one, and at least one is left;
    a class with a single image therefore keeps it for training. With groups it is the nearest that taking
    them one after the other gives.
    """
    total = {name: len(paths) for name, paths in paths_by_class.items()}
    wanted = {name: max(1, round(number * fraction)) for name, number in total.items()}
    have: Counter[str] = Counter()
    taken: set[str] = set()
    units = sorted(build_units(paths_by_class, groups or {}), key=lambda unit: unit.key(seed))

    def take(unit: Unit) -> None:
        have.update(unit.counts)
        taken.update(unit.paths)

    def leaves_some(unit: Unit) -> bool:
        return all(have[name] + number < total[name] for name, number in unit.counts.items())

    for unit in units:
        now = sum(abs(wanted[name] - have[name]) for name in unit.counts)
        then = sum(abs(wanted[name] - have[name] - number) for name, number in unit.counts.items())
        if then < now and leaves_some(unit):
            take(unit)
    for name in sorted(total):  # whose groups are all larger than twice of what was wanted
        if have[name]:
            continue
        if own := [unit for unit in units if name in unit.counts and leaves_some(unit)]:
            take(min(own, key=lambda unit: len(unit.paths)))
    return taken


def draw_folds(
    paths_by_class: Mapping[str, Sequence[str]], num_folds: int, seed: int, groups: Groups | None = None
) -> dict[str, int]:
    """Return the fold of each path, from 1: classes spread evenly, groups whole.

    The largest units are dealt first, each to the fold that has the least of its classes.
    """
    total = {name: len(paths) for name, paths in paths_by_class.items()}
    have = [Counter[str]() for _ in range(num_folds)]
    sizes = [0] * num_folds
    folds: dict[str, int] = {}
    units = build_units(paths_by_class, groups or {})
    for unit in sorted(units, key=lambda unit: (-len(unit.paths), unit.key(seed))):
        held = [sum(n * mine[name] / total[name] for name, n in unit.counts.items()) for mine in have]
        fold = min(range(num_folds), key=lambda place: (held[place], sizes[place], place))
        have[fold].update(unit.counts)
        sizes[fold] += len(unit.paths)
        folds.update(dict.fromkeys(unit.paths, fold + 1))
    return folds


# --- exact copies --------------------------------------------------------------------------------


def keep_copies_together(dataset: Dataset, digests: Mapping[str, str], seed: int) -> tuple[Dataset, int]:
    """Return a drawn data set in which copies of a picture lie in one part, and how many images moved.

    What a draw has torn goes back to the training images, with its whole group; with folds, to the fold of
    its first image. A class that would lose all its validation images gives others in their place.

    Args:
        dataset: whose validation part was drawn; parts that were given stay as they are.
        digests: sha256 by path; images without one have no copies.
        seed: of the draw.

    Raises:
        DataError: the copies leave a class without training images.
    """
    pool = [sample for sample in dataset.samples if sample.split != "test"]
    units = join_copies(pool, digests)
    moved = _move_folds(pool, units) if any(one.fold for one in pool) else _move_back(pool, units, seed)
    if not moved:
        return dataset, 0
    samples = [moved.get(sample.path, sample) for sample in dataset.samples]
    samples.sort(key=lambda sample: (SPLITS.index(sample.split), sample.path))
    result = replace(dataset, samples=tuple(samples))
    lost = [name for name, number in zip(dataset.classes, result.counts("train"), strict=True) if not number]
    if lost:
        found = f"all images of class {lost[0]!r} are copies of one picture, or of one group"
        raise DataError(
            f"data in {dataset.root}", found, "Add other images of the class, or take fewer folds."
        )
    before = {sample.path: sample.split for sample in dataset.samples}
    return result, sum(before[sample.path] != sample.split for sample in moved.values())


def join_copies(pool: Sequence[Sample], digests: Mapping[str, str]) -> list[list[Sample]]:
    """Return images that are joined by a group or by being copies, however many links lie between them."""
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
    for sample in sorted(pool, key=lambda one: one.path):
        joined[top(f"path {sample.path}")].append(sample)
    return list(joined.values())


def _move_folds(pool: Sequence[Sample], units: Sequence[Sequence[Sample]]) -> dict[str, Sample]:
    held_out = next((sample.fold for sample in pool if sample.split == "val"), 0)
    return {
        sample.path: replace(sample, fold=unit[0].fold, split="val" if unit[0].fold == held_out else "train")
        for unit in units
        for sample in unit
        if sample.fold != unit[0].fold
    }


def _move_back(pool: Sequence[Sample], units: Sequence[Sequence[Sample]], seed: int) -> dict[str, Sample]:
    """Bring torn units back to training, and give classes that lost all of validation another unit."""
    counts = Counter((sample.label, sample.split) for sample in pool)
    moved: dict[str, Sample] = {}

    def move(unit: Sequence[Sample], split: str) -> Iterator[tuple[str, Sample]]:
        for sample in unit:
            if sample.split != split:
                counts[sample.label, sample.split] -= 1
                now = replace(sample, split="val" if split == "val" else "train")
                counts[sample.label, now.split] += 1
                yield sample.path, now

    torn = [unit for unit in units if len({sample.split for sample in unit}) > 1]
    for unit in torn:
        moved.update(move(unit, "train"))
    emptied = sorted({sample.label for sample in moved.values() if not counts[sample.label, "val"]})
    for label in emptied:
        for unit in sorted(units, key=lambda one: _unit_key(one, seed)):
            need = Counter(sample.label for sample in unit)
            if label in need and all(counts[other, "train"] > number for other, number in need.items()):
                now = [moved.get(sample.path, sample) for sample in unit]
                moved.update(move(now, "val"))
                break
    return moved


def _unit_key(unit: Sequence[Sample], seed: int) -> bytes:
    return sha256(f"{seed}/{unit[0].path}".encode()).digest()
