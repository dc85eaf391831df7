"""``finetune extend``: the data of a run and more of them, with old classes or new ones.

::

    RUN's images, MORE -> grow -> <output>.csv, recipe -> finetune run -> finetune/pipeline/forgetting.py

A solved classifier is solved again on all images, whose features are kept. A trained network goes on from
RUN's weights, its classifier with the rows of the classes that it knows.

An image that RUN had, by its sha256, keeps its split, since RUN learned from it or was judged by it. The
split of any other image follows from its own sha256, so that it does not depend on what was added before.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.data.dataset import SPLITS, UNREADABLE, Dataset, Split
from finetune.data.prepare import read_images, require_labels
from finetune.errors import DataError, UsageError, count
from finetune.features.extraction import open_images
from finetune.recipe import Recipe, load_recipe
from finetune.runs.claim import create_folder
from finetune.runs.files import write_csv
from finetune.runs.folder import RunFolder
from finetune.runs.reader import RunReader
from finetune.system.display import Display
from finetune.targets import Target, name_target

_COLUMNS = ("path", "label", "split")
_SHOWN = 5


@dataclass(frozen=True)
class LabelledFile:
    """An image of a data set.

    Attributes:
        file: its absolute path.
        label: its label as text.
        split: its split.
        digest: its sha256.
    """

    file: Path
    label: str
    split: Split
    digest: str


def plan_extension(run: Path, data: str, replaces: bool, output: Path, display: Display) -> Recipe:
    """Write the table of a run's images and more of them, and return the recipe of the run on all.

    Args:
        run: a finished run; it is not changed.
        data: more images, as ``--data`` of ``finetune run``; some may be images of the run.
        replaces: these are all images: those of the run that are not among them are left out.
        output: folder of the new run; the table lies beside it, with the ending ``.csv``.
        display: shows progress, and what is new.

    Raises:
        UsageError: there is no finished run.
        DataError: images of the run are gone, classes were renamed, or there is nothing new.
    """
    began, target = _read_finished(run)
    is_solved = RunReader(RunFolder(run)).metrics.get("features") is not None
    if not is_solved and not target.has_classes:
        found = "its network was trained for numbers in units of the old images' deviation"
        fix = "Extend a run with strategy.features, whose classifier is solved again."
        raise UsageError(f"finetune extend {run}", found, fix)
    old = _read_old(run, began, replaces, display)
    more = _list_files(began, _open_more(began, data, display), display)
    if target.has_classes:
        _refuse_renamed(data, old, more, target)
    grown = grow(old, more, replaces, began.data.val_fraction, target)
    _describe(old, grown, target, display)
    table = output.with_name(f"{output.name}.csv").absolute()
    create_folder(table.parent)
    root = Path(os.path.commonpath([image.file.parent for image in grown]))
    rows = [(image.file.relative_to(root).as_posix(), image.label, image.split) for image in grown]
    write_csv(table, rows, _COLUMNS)
    own = {"path": str(table), "image_root": str(root), "label_column": _COLUMNS[1], "target": target.kind}
    return _to_recipe(run, began, own, is_solved)


def grow(
    old: Sequence[LabelledFile],
    more: Sequence[LabelledFile],
    replaces: bool,
    val_fraction: float,
    target: Target,
) -> list[LabelledFile]:
    """Return all images with their splits, each content once, in the order of the paths.

    Args:
        old: images of the run.
        more: further ones; their labels count where both have an image.
        replaces: leave out old images that are not among the further ones.
        val_fraction: share of images without a split that become validation images.
        target: what the labels are.
    """
    known = {image.digest: image.split for image in old}
    images = {image.digest: image for image in more}
    if not replaces:
        images = {image.digest: image for image in old} | images
    has_splits = any(image.split != "train" for image in more)
    has_test = "test" in known.values()
    chosen: dict[str, Split] = {}
    for digest, image in images.items():
        given = "val" if image.split == "test" and not has_test else image.split
        chosen[digest] = known.get(digest) or (given if has_splits else _draw(digest, val_fraction))
    for digests in _by_class(images, target):
        _fill(digests, known, chosen)
    grown = [replace(image, split=chosen[digest]) for digest, image in images.items()]
    return sorted(grown, key=lambda image: image.file)


def _draw(digest: str, val_fraction: float) -> Split:
    """Return the split of an image by its content."""
    return "val" if int(digest[:12], 16) / 16**12 < val_fraction else "train"


def _by_class(images: Mapping[str, LabelledFile], target: Target) -> Iterable[list[str]]:
    """Return the images of each class, in the order of their sha256."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for digest, image in sorted(images.items()):
        for name in target.classes_of(image.label):
            found[name].append(digest)
    return found.values()


def _fill(digests: Sequence[str], known: Mapping[str, Split], chosen: dict[str, Split]) -> None:
    """Give a class images in training, and in validation one that the run has not learned from."""
    splits = {chosen[digest] for digest in digests}
    new = [digest for digest in digests if digest not in known]
    if "train" not in splits:
        chosen[(new or digests)[-1]] = "train"
    elif splits == {"train"} and new and len(digests) > 1:
        chosen[new[0]] = "val"


# --- reading -------------------------------------------------------------------------------------


def _read_finished(run: Path) -> tuple[Recipe, Target]:
    reader = RunReader(RunFolder(run))
    if reader.recipe is None or reader.state != "done":
        found = "it is not the folder of a finished run"
        raise UsageError(f"finetune extend {run}", found, "Name the --output of a finished `finetune run`.")
    return reader.recipe, name_target(reader.metrics.get("target"))


def _read_old(run: Path, began: Recipe, replaces: bool, display: Display) -> list[LabelledFile]:
    """Return the images that a run began with, as it recorded them.

    Raises:
        DataError: some of them are gone, and all are needed.
    """
    rows = RunReader(RunFolder(run)).split
    root = Path() if replaces else _find_root(run, began, {row["path"] for row in rows}, display)
    splits: dict[str, Split] = {split: split for split in SPLITS}
    return [
        LabelledFile(root / row["path"], row["label"], splits[row["split"]], row["sha256"])
        for row in rows
        if row["split"] in splits and row["sha256"] != UNREADABLE
    ]


def _find_root(run: Path, began: Recipe, paths: Set[str], display: Display) -> Path:
    """Return the folder of a run's images; raise if one is gone."""
    asked = f"the images of {run}"
    fix = (
        "Restore them. Without them nothing can be solved or judged again; "
        f"`finetune run --backbone {run} --data MORE` trains on other images alone, and forgets."
    )
    try:
        dataset = open_images(_with_data(began, str(run)), display)
    except DataError as error:
        raise DataError(asked, f"they are gone: {error.message}", fix) from None
    gone = sorted(paths - {sample.path for sample in dataset.samples})
    if gone:
        found = f"{len(gone)} of {count(len(paths), 'image')} are gone (for example {gone[0]})"
        raise DataError(asked, found, fix)
    return dataset.root.absolute()


def _open_more(began: Recipe, data: str, display: Display) -> Dataset:
    own = {"image_root": None} if Path(data).is_dir() else {}
    recipe = _with_data(began, data, **own)
    dataset = _name_only_class(open_images(recipe, display, draws=False))
    require_labels(dataset, recipe)
    return dataset


def _name_only_class(dataset: Dataset) -> Dataset:
    """Return images of one class folder with this class; elsewhere a single folder names no class."""
    folders = {sample.path.rpartition("/")[0] for sample in dataset.samples}
    [folder] = folders if len(folders) == 1 else [""]
    if dataset.is_labelled or not folder or "/" in folder:
        return dataset
    samples = tuple(replace(sample, label=0) for sample in dataset.samples)
    return replace(dataset, classes=(folder,), samples=samples)


def _with_data(began: Recipe, data: str, **others: Any) -> Recipe:
    return began.model_copy(update={"data": began.data.model_copy(update={"path": data} | others)})


def _list_files(recipe: Recipe, dataset: Dataset, display: Display) -> list[LabelledFile]:
    """Return the images of a data set that can be read."""
    read = read_images(recipe, dataset, display)
    return [
        LabelledFile(
            read.file(sample).absolute(), read.label_of(sample), sample.split, read.digests[sample.path]
        )
        for sample in read.samples
        if sample.path in read.digests
    ]


# --- what is refused, and what is said -----------------------------------------------------------


def _refuse_renamed(
    data: str, old: Sequence[LabelledFile], more: Sequence[LabelledFile], target: Target
) -> None:
    """Refuse classes that are classes of the run under other names.

    Raises:
        DataError: all images that both know of an old class have another label, or names differ in nothing
            but case, spaces and signs.
    """
    classes, others = (sorted(_count_classes(images, target)) for images in (old, more))
    before = {image.digest: image.label for image in old}
    labels: defaultdict[str, set[str]] = defaultdict(set)
    for image in more:
        if image.digest in before:
            labels[before[image.digest]].add(image.label)
    renamed = {name: found for name, found in labels.items() if name not in found and not found & {*classes}}
    alike = {_simplify(name): name for name in classes}
    renamed |= {
        alike[_simplify(name)]: {name} for name in others if name not in classes and _simplify(name) in alike
    }
    if renamed:
        one, found = next(iter(renamed.items()))
        said = f"its class {min(found)!r} is {one!r} in the run"
        said += f" (classes of the run: {_join(classes)}; of --data: {_join(others)})"
        raise DataError(f"--data {data}", said, "Give classes the names that they have in the run.")


def _simplify(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum()) or name


def _count_classes(images: Iterable[LabelledFile], target: Target) -> Counter[str]:
    return Counter(name for image in images for name in target.classes_of(image.label))


def _describe(
    old: Sequence[LabelledFile], grown: Sequence[LabelledFile], target: Target, display: Display
) -> None:
    """Say what is new.

    Raises:
        DataError: nothing is.
    """
    before, now = ({image.digest: image.label for image in images} for images in (old, grown))
    added, removed = now.keys() - before.keys(), before.keys() - now.keys()
    changed = [digest for digest in now.keys() & before.keys() if now[digest] != before[digest]]
    if not (added or removed or changed):
        raise DataError("--data", "the run has all of these images already", "Name new ones.")
    parts = [f"{count(len(added), 'image')} new", f"{len(now) - len(added):,} of the run"]
    parts += [f"{len(removed):,} removed"] if removed else []
    parts += [f"{len(changed):,} with another label"] if changed else []
    if target.has_classes:
        classes, others = (_count_classes(images, target).keys() for images in (old, grown))
        for what, names in (("new classes", others - classes), ("removed classes", classes - others)):
            parts += [f"{what}: {_join(sorted(names))}"] if names else []
    display.say(", ".join(parts))


def _join(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


# --- the recipe ----------------------------------------------------------------------------------


def _to_recipe(run: Path, began: Recipe, data: Mapping[str, Any], is_solved: bool) -> Recipe:
    """Return the recipe of a run on other data: one that solves again, or goes on from a trained network."""
    own: dict[str, Any] = {f"data.{key}": value for key, value in data.items()}
    own |= dict.fromkeys(("data.folds", "data.fold", "data.path_column", "data.split_column", "data.suffix"))
    own |= {"data.label_separator": None, "data.group_by": None, "device": "auto"}
    if not is_solved:
        own |= {"backbone.name": str(run), "backbone.weights": None, "strategy.head": "extend"}
        own |= {"strategy.probe_first": False}  # the head begins with the rows of the run
        if began.strategy.starts_random:
            own |= {"strategy.name": "full"}
    return load_recipe(began, own)
