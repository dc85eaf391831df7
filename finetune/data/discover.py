"""Find the images of a dataset, with labels and splits; refuse data that would give wrong metrics.

Three layouts give one list of samples: ``train/<class>/`` (with or without ``val/`` and ``test/``),
``<class>/`` alone, and a CSV file ``path,label[,split]``. The folders may be in a zip archive. Class indices
come from the training split alone, so that a class missing from validation does not shift them. Images
without labels are found as well (:func:`find_images`). Nothing is written into the user's folder.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.data.archives.archive import (
    Progress,
    find_split_archives,
    open_archive,
    open_split_archives,
)
from finetune.data.archives.entries import KINDS, is_archive
from finetune.data.dataset import SPLITS, Dataset, Issue, Sample, Split, to_check
from finetune.data.folders import explain_others, images_below, tell_hidden, warn_ignored
from finetune.data.layout import LayoutReader, extensions, is_junk, names_in, printable, some
from finetune.data.layouts.class_folders import find_inner, read_folder
from finetune.data.layouts.class_names import join_spellings, warn_look_alikes
from finetune.data.layouts.lists import find_lists, name_lists
from finetune.data.layouts.split_folders import choose, is_plain
from finetune.data.samples import is_sample, open_sample
from finetune.data.split import (
    FOLD_FIX,
    SplitConfig,
    draw_folds,
    find_fold_fault,
    find_groups,
    find_indivisible,
    split_off,
)
from finetune.data.tables.config import BY_NAMES, TableConfig
from finetune.data.tables.files import FETCH, is_address
from finetune.data.tables.format import is_table
from finetune.data.tables.rows import read_csv
from finetune.errors import DataError, count, suggest
from finetune.targets import SINGLE, Target, fit_target


def discover(
    data: Path,
    config: SplitConfig,
    follow_links: bool = False,
    on_progress: Progress | None = None,
    draws: bool = True,
    table: TableConfig = BY_NAMES,
) -> Dataset:
    """Return every image below ``data`` (a folder, a zip archive or a CSV file) with its class and split.

    Args:
        data: folder with ``train/``, flat folder of class folders, a zip archive of either, CSV file with
            ``path,label[,split]``, or a sample (``sample:digits``).
        config: how the validation split is made, where ``data`` gives none or folds are asked for.
        follow_links: read images through links that lead out of the folder.
        on_progress: called with (entries unpacked, entries in all) while an archive is unpacked.
        draws: whether a validation split is drawn where the data give none; without it, all images that the
            data give no split are training images.
        table: how a CSV file is read, where its own names do not say so.

    Raises:
        DataError: there is nothing to train on, or the layout is ambiguous.
        UsageError: the fold does not exist.
        DiskError: no space or no permission to unpack an archive.
    """
    reader = LayoutReader(
        f"--data {printable(data)}", data.absolute(), follow_links=follow_links, table=table
    )
    dataset = _discover(reader, data, config, on_progress, draws)
    assert dataset is not None
    return dataset


def discover_leniently(
    data: Path,
    config: SplitConfig,
    follow_links: bool = False,
    on_progress: Progress | None = None,
    table: TableConfig = BY_NAMES,
) -> tuple[Dataset | None, tuple[Issue, ...]]:
    """Read as :func:`discover` does, but collect errors instead of raising, and leave out the faulty images.

    With folds, the first fold is the validation split.

    Returns:
        The dataset (None if it cannot be read at all) and every issue.

    Raises:
        DiskError: no space or no permission to unpack an archive.
    """
    reader = LayoutReader(
        f"--data {printable(data)}", data.absolute(), follow_links=follow_links, is_lenient=True, table=table
    )
    config = replace(config, fold=1 if config.folds else None)
    dataset = None
    try:
        dataset = _discover(reader, data, config, on_progress)
    except DataError as error:
        reader.issues.append(Issue("unusable", "error", error.message, error.fix))
    return dataset, tuple(reader.issues)


def _discover(
    reader: LayoutReader,
    data: Path,
    config: SplitConfig,
    on_progress: Progress | None,
    draws: bool = True,
) -> Dataset | None:
    config.check_fold()
    is_table = read_data(reader, data, on_progress, config.group_by)
    _check_kind(reader, is_table)
    join_spellings(reader)
    if reader.is_lenient and not reader.splits.get("train"):
        return None
    for by_class in reader.splits.values():  # only a lenient reader still has links that lead out
        for name, paths in by_class.items():
            by_class[name] = [path for path in paths if path not in reader.links_out]
    drawn = (draws and "val" not in reader.splits) or config.folds is not None
    dataset = _dataset(reader, config, drawn)
    return replace(dataset, is_folder=not is_table, val_was_drawn=drawn, issues=tuple(reader.issues))


def _check_kind(reader: LayoutReader, is_table: bool) -> None:
    """Refuse labels that a folder cannot give.

    Raises:
        DataError: several labels an image, or numbers, are asked of class folders.
    """
    if not is_table and reader.table.target not in (None, "single"):
        found = f"is no table, and class folders give each image one class, not {reader.table.target} labels"
        raise reader.error(found, "Give a CSV file, or leave --target out.")


def find_missing(data: Path) -> DataError | None:
    """Return the error of a path that does not exist; None if it does, or names a sample."""
    if is_sample(data) or os.path.exists(data):  # noqa: PTH110 (Path.exists raises below a closed folder)
        return None
    found = printable(f"does not exist{suggest(data.name, names_in(data.absolute().parent))}")
    return DataError(f"--data {printable(data)}", found, "Give a folder of images or a CSV file.")


def check_missing(data: str | None) -> dict[str, Any] | None:
    """Return what ``finetune check`` finds at a path that does not exist; None if there is one."""
    error = find_missing(Path(data)) if data else None
    return to_check([Issue("unusable", "error", error.message, error.fix)], {}) if error else None


def read_data(
    reader: LayoutReader, data: Path, on_progress: Progress | None = None, group_by: str | None = None
) -> bool:
    """Read a folder, a zip archive, a CSV file or a sample; return whether it is a CSV file.

    Raises:
        DataError: it is none of them, or cannot be read.
        UsageError: there is no sample of this name.
    """
    if is_sample(data):
        reader.root = open_sample(data)
        read_folder(reader, group_by)
        return False
    if is_address(str(data).replace(":/", "://", 1)):  # Path joins the two slashes
        raise reader.error("is an address", FETCH)
    if missing := find_missing(data):
        raise missing
    suffix = data.suffix.lower() if data.is_file() else ""
    is_list = bool(suffix) and is_table(data.name)
    if data.is_dir():
        if packed := find_split_archives(data):
            reader.beside = find_lists(reader)
            reader.root, reader.from_archive = open_split_archives(reader, packed, on_progress), True
        read_folder(reader, group_by)
    elif is_list:
        reader.root = reader.root.parent
        read_csv(reader, data, group_by)
    elif suffix and is_archive(data.name):
        reader.root, reader.from_archive = open_archive(reader, data, on_progress), True
        read_folder(reader, group_by)
    else:
        raise _refuse_kind(reader, suffix)
    return is_list


def _refuse_kind(reader: LayoutReader, suffix: str) -> DataError:
    if suffix in KINDS:
        return reader.error(
            f"is a {KINDS[suffix]} archive, and only zip, tar and tar.gz are read",
            "Unpack it first, and give the folder.",
        )
    return reader.error(
        "is neither a folder, a zip or tar archive nor a CSV file",
        "Give a folder of class folders, a zip or tar archive of it, or a CSV file with path,label[,split].",
    )


def _dataset(reader: LayoutReader, config: SplitConfig, draws: bool) -> Dataset:
    """Apply the checks common to all layouts, draw the validation split if asked to, number the labels."""
    given = [label for by_label in reader.splits.values() for label in by_label]
    target = fit_target(reader.target_kind, _repeat(reader.splits["train"]))
    # Of the training split alone, so that a class missing from validation does not shift the others.
    classes = target.name_outputs(reader.splits["train"])
    _require_two(reader, classes)
    for split in ("val", "test"):
        if split in reader.splits:
            _compare_with_training(reader, split, target)
    warn_look_alikes(reader, classes)
    groups = find_groups(reader, config.group_by)
    folds: dict[str, int] = {}
    if config.folds is not None and config.fold is not None:
        folds = _deal_folds(reader, config.folds, config.fold, config.seed, groups, target)
    elif not draws:
        _warn_singles(reader, target)
    else:
        _split_off_validation(reader, config.val_fraction, config.seed, groups, target)
    labels = classes if target == SINGLE else tuple(sorted(set(given)))
    index = {name: number for number, name in enumerate(labels)}
    samples = [
        Sample(path, index[name], split, groups.get(path, ""), folds.get(path, 0))
        for split in SPLITS
        for path, name in sorted((p, name) for name, ps in reader.splits.get(split, {}).items() for p in ps)
    ]
    texts = () if target == SINGLE else labels
    return Dataset(
        reader.root, classes, tuple(samples), tuple(reader.warnings), target=target, label_texts=texts
    )


def _repeat(by_label: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the label of every image, in an order that does not depend on the paths."""
    return [label for label in sorted(by_label) for _ in by_label[label]]


def _require_two(reader: LayoutReader, classes: Sequence[str]) -> None:
    if len(classes) >= 2 or len(reader.splits["train"]) >= 2:  # a single output has several labels
        return
    if reader.target_kind != "single":
        found = f"has one label in all training images, {next(iter(reader.splits['train']))!r}"
        reader.reject("class-one", found, "Add images with another label.")
        return
    # An archive unpacked into a folder of its own name is the usual reason.
    inner = find_inner(reader, classes[0])
    fix = "Add the images of at least one more class."
    if inner:
        fix = f"Did you mean --data {printable(reader.root / inner)}?"
    if inner and reader.from_archive:  # the user has never seen the path into the cache
        fix = "Pack it so that the class folders, or train/, lie at the top."
    found = f"has only one class, {classes[0]!r}; a classifier needs at least two"
    lists = "" if inner else name_lists(reader, classes[0], names_in(reader.root / classes[0]))
    lists = "" if is_table(reader.asked) else lists or name_lists(reader, "", names_in(reader.root))
    reader.reject("class-one", found, fix + lists + tell_hidden(reader))


def _compare_with_training(reader: LayoutReader, split: Split, target: Target) -> None:
    """Reject classes that the training split does not have; warn about classes missing from this split."""
    known, own = set(target.name_outputs(reader.splits["train"])), reader.splits[split]
    unknown = sorted(set(target.name_outputs(own)) - known)
    if unknown:
        reader.reject(
            "class-unknown",
            f"{split} has {count(len(unknown), 'class', 'classes')} that training does not have: "
            f"{some(unknown)}{suggest(unknown[0], sorted(known))}",
            "Rename the class as in training, add training images for it, or remove it.",
            len(unknown),
        )
        for label in [label for label in own if not known.issuperset(target.classes_of(label))]:
            del own[label]
    missing = sorted(known - set(target.name_outputs(own)))
    if missing:
        reader.warn(
            "class-missing",
            f"{split} has no images of {count(len(missing), 'class', 'classes')} {some(missing)}, "
            "so it cannot be tested there.",
            f"Add images of it to {split}.",
            len(missing),
        )


def _singles(strata: Mapping[str, Sequence[str]]) -> list[str]:
    return sorted(name for name, paths in strata.items() if len(paths) == 1)


def _warn_singles(reader: LayoutReader, target: Target) -> None:
    if singles := _singles(target.strata(reader.splits["train"])):
        reader.warn(
            "class-tiny",
            f"{count(len(singles), 'class has', 'classes have')} a single training image: {some(singles)}.",
            "Add images of these classes.",
            len(singles),
        )


def _split_off_validation(
    reader: LayoutReader, fraction: float, seed: int, groups: Mapping[str, str], target: Target
) -> None:
    """Move a fraction of each class's training images to validation."""
    train = reader.splits["train"]
    strata = target.strata(train)
    if singles := _singles(strata):
        reader.reject(
            "class-single",
            f"{count(len(singles), 'class has', 'classes have')} a single image and no validation split is "
            f"given: {some(singles)}; one image cannot be both trained on and tested",
            "Add images of these classes, or give your own validation split (val/, or split=val in the CSV).",
            len(singles),
        )
    _reject_indivisible(reader, strata, groups, singles)
    taken = split_off(strata, fraction, seed, groups)
    reader.splits["val"] = {name: [p for p in paths if p in taken] for name, paths in train.items()}
    reader.splits["train"] = {name: [p for p in paths if p not in taken] for name, paths in train.items()}


def _reject_indivisible(
    reader: LayoutReader,
    pool: Mapping[str, Sequence[str]],
    groups: Mapping[str, str],
    reported: Sequence[str] = (),
) -> None:
    """Reject classes whose images all belong to one group: no draw can divide them."""
    indivisible = [name for name in find_indivisible(pool, groups) if name not in reported]
    if indivisible:
        reader.reject(
            "group-single",
            f"all images of {count(len(indivisible), 'class', 'classes')} {some(indivisible)} belong to one "
            "group, or are one; they cannot be both trained on and tested",
            "Add images of other groups, or give your own validation split.",
            len(indivisible),
        )


def _deal_folds(
    reader: LayoutReader, num_folds: int, fold: int, seed: int, groups: Mapping[str, str], target: Target
) -> dict[str, int]:
    """Deal the images of training and validation into folds; one of them becomes the validation split."""
    pool: defaultdict[str, list[str]] = defaultdict(list)
    for split in ("train", "val"):
        for name, paths in reader.splits.get(split, {}).items():
            pool[name] += paths
    strata = target.strata(pool)
    _reject_indivisible(reader, strata, groups)
    folds = draw_folds(strata, num_folds, seed, groups)
    if len(set(folds.values())) < num_folds:
        fault = find_fold_fault(strata, folds, num_folds)
        raise DataError(f"data.folds={num_folds}", str(fault), "Take fewer folds.")
    reader.splits["val"] = {name: [p for p in paths if folds[p] == fold] for name, paths in pool.items()}
    reader.splits["train"] = {name: [p for p in paths if folds[p] != fold] for name, paths in pool.items()}
    if fault := find_fold_fault(strata, folds, num_folds):
        reader.reject("fold-empty", fault, FOLD_FIX)
    return folds


# --- Images with or without labels ---


def find_images(
    data: Path,
    config: SplitConfig,
    follow_links: bool = False,
    on_progress: Progress | None = None,
    draws: bool = True,
    table: TableConfig = BY_NAMES,
) -> Dataset:
    """Return what :func:`finetune.data.discover.discover` finds, or every image of a folder without classes.

    A folder has no classes if it holds fewer than two folders and none is named like a split. Its images then
    have the label -1, and the dataset has no classes.

    Raises:
        DataError: there is no image, or the layout is ambiguous.
    """
    if not _is_unlabelled(data) or find_split_archives(data):
        return discover(data, config, follow_links, on_progress, draws=draws, table=table)
    reader = LayoutReader(
        f"--data {printable(data)}", data.absolute(), follow_links=follow_links, table=table
    )
    images, others = images_below(reader, "")
    reader.check_links()
    if not images:
        found = f"holds no images{extensions(others, ', only ')}"
        raise reader.error(found, f"Give a folder of images or a CSV file.{explain_others(others)}")
    warn_ignored(reader, "", (), others)
    samples = tuple(Sample(path, -1, "train") for path in images)
    return Dataset(reader.root, (), samples, tuple(reader.warnings))


def _is_unlabelled(data: Path) -> bool:
    if not data.is_dir():
        return False
    folders = [name for name in names_in(data) if not is_junk(name) and (data / name).is_dir()]
    return len(folders) < 2 and not any(map(is_plain, folders)) and "train" not in choose(folders)
