"""Find images and labels in a folder or a CSV file, and refuse whatever would give a wrong number.

Three layouts, one list: ``train/<class>/`` (with or without ``val/`` and ``test/``), ``<class>/`` alone, and
a CSV file ``path,label[,split]``; the folders may come in a zip archive. The class list comes from the
training split alone, so that a class that validation lacks shifts no index. Nothing is ever written into the
user's folder.
"""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from finetune.data.archive import KINDS, Progress, open_archive
from finetune.data.dataset import SPLITS, Dataset, Issue, Sample, Split
from finetune.data.folders import images_below, read_folder
from finetune.data.layout import SPLIT_NAMES, LayoutReader, count, is_junk, names_in, printable, some
from finetune.data.samples import is_sample, open_sample
from finetune.data.split import (
    FOLD_FIX,
    SplitConfig,
    draw_folds,
    find_fold_fault,
    find_groups,
    find_undividable,
    split_off,
)
from finetune.data.table import read_csv
from finetune.errors import DataError, suggest


def discover(
    data: Path, config: SplitConfig, follow_links: bool = False, on_progress: Progress | None = None
) -> Dataset:
    """Return every image below ``data`` (a folder, a zip archive or a CSV file) with its class and split.

    Args:
        data: folder with ``train/``, flat folder of class folders, a zip archive of either, CSV file with
            ``path,label[,split]``, or a sample (``sample:digits``).
        config: how the validation split is made, where ``data`` gives none or folds are asked for.
        follow_links: read images through links that lead out of the folder.
        on_progress: called with the entries done and their number while an archive is unpacked.

    Raises:
        DataError: there is nothing to train on, or what is there has more than one reading.
        UsageError: there is no such fold.
        DiskError: an archive cannot be unpacked for lack of space or permission.
    """
    finding = LayoutReader(f"--data {printable(data)}", data.absolute(), follow_links=follow_links)
    dataset = _discover(finding, data, config, on_progress)
    assert dataset is not None
    return dataset


def survey(
    data: Path, config: SplitConfig, follow_links: bool = False, on_progress: Progress | None = None
) -> tuple[Dataset | None, tuple[Issue, ...]]:
    """Read as :func:`discover` does, and go on after what it refuses, without the faulty images.

    The first of the folds is the validation split, whichever is asked for.

    Returns:
        The data set, None where nothing can be made of it, and every remark.

    Raises:
        DiskError: an archive cannot be unpacked for lack of space or permission.
    """
    finding = LayoutReader(
        f"--data {printable(data)}", data.absolute(), follow_links=follow_links, is_lenient=True
    )
    config = replace(config, fold=1 if config.folds else None)
    dataset = None
    try:
        dataset = _discover(finding, data, config, on_progress)
    except DataError as error:
        finding.issues.append(Issue("unusable", "error", error.message, error.fix))
    return dataset, tuple(finding.issues)


def _discover(
    finding: LayoutReader, data: Path, config: SplitConfig, on_progress: Progress | None
) -> Dataset | None:
    config.check_fold()
    is_table = read_data(finding, data, on_progress, config.group_by)
    if finding.is_lenient and not finding.parts.get("train"):
        return None
    for part in finding.parts.values():  # of a lenient reading: a strict one has refused them
        for name, paths in part.items():
            part[name] = [path for path in paths if path not in finding.links_out]
    drawn = "val" not in finding.parts or config.folds is not None
    dataset = _dataset(finding, config)
    return replace(dataset, is_folder=not is_table, val_was_drawn=drawn, issues=tuple(finding.issues))


def read_data(
    finding: LayoutReader, data: Path, on_progress: Progress | None = None, group_by: str | None = None
) -> bool:
    """Read a folder, a zip archive, a CSV file or a sample; return whether it was a CSV file.

    Raises:
        DataError: it is none of them, or cannot be read.
        UsageError: there is no sample of this name.
    """
    if is_sample(data):
        finding.root = open_sample(data)
        read_folder(finding)
        return False
    if not os.path.exists(data):  # noqa: PTH110 (Path.exists raises below a closed folder)
        siblings = names_in(finding.root.parent)
        raise finding.refuse(
            f"does not exist{suggest(data.name, siblings)}", "Give a folder of images or a CSV file."
        )
    suffix = data.suffix.lower() if data.is_file() else ""
    if data.is_dir():
        read_folder(finding)
    elif suffix == ".csv":
        finding.root = finding.root.parent
        read_csv(finding, data, group_by)
    elif suffix == ".zip":
        finding.root, finding.from_archive = open_archive(finding, data, on_progress), True
        read_folder(finding)
    else:
        raise _refuse_kind(finding, suffix)
    return suffix == ".csv"


def _refuse_kind(finding: LayoutReader, suffix: str) -> DataError:
    if suffix in KINDS:
        return finding.refuse(
            f"is a {KINDS[suffix]} archive, and only zip is read",
            "Unpack it first, and give the folder.",
        )
    return finding.refuse(
        "is neither a folder, a zip archive nor a CSV file",
        "Give a folder of class folders, a zip archive of it, or a CSV file with path,label[,split].",
    )


def _dataset(finding: LayoutReader, config: SplitConfig) -> Dataset:
    """Apply the rules that do not depend on the layout, and number the classes."""
    train = finding.parts["train"]
    # Plain code-point order, as torchvision's ImageFolder: indices of other people's models stay valid.
    classes = tuple(sorted(train))
    _require_two(finding, classes)
    for split in ("val", "test"):
        if split in finding.parts:
            _compare_with_training(finding, split)
    _warn_look_alikes(finding, classes)
    groups = find_groups(finding, config.group_by)
    folds: dict[str, int] = {}
    if config.folds is not None and config.fold is not None:
        folds = _deal_folds(finding, config.folds, config.fold, config.seed, groups)
    elif "val" in finding.parts:
        _warn_singles(finding)
    else:
        _split_off_validation(finding, config.val_fraction, config.seed, groups)
    index = {name: number for number, name in enumerate(classes)}
    samples = [
        Sample(path, index[name], split, groups.get(path, ""), folds.get(path, 0))
        for split in SPLITS
        for path, name in sorted((p, name) for name, ps in finding.parts.get(split, {}).items() for p in ps)
    ]
    return Dataset(finding.root, classes, tuple(samples), tuple(finding.warnings))


def _require_two(finding: LayoutReader, classes: Sequence[str]) -> None:
    if len(classes) >= 2:
        return
    # An archive unpacked into a folder of its own name is the usual reason.
    inside = finding.root / classes[0]
    folders = [name for name in names_in(inside) if (inside / name).is_dir() and not name.startswith(".")]
    nested = len(folders) >= 2 or any(name.lower() == "train" for name in folders)
    fix = "Add the images of at least one more class."
    if nested:
        fix = f"Did you mean --data {printable(inside)}?"
    if nested and finding.from_archive:  # a path into the cache is none that the user has seen
        fix = "Pack it so that the class folders, or train/, lie at the top."
    found = f"has only one class, {classes[0]!r}; a classifier needs at least two"
    finding.object("class-one", found, fix)


def _compare_with_training(finding: LayoutReader, split: Split) -> None:
    """Refuse classes that training does not know; warn of those that this part lacks."""
    train, part = finding.parts["train"], finding.parts[split]
    unknown = sorted(set(part) - set(train))
    if unknown:
        finding.object(
            "class-unknown",
            f"{split} has {count(len(unknown), 'class', 'classes')} that training does not have: "
            f"{some(unknown)}{suggest(unknown[0], sorted(train))}",
            "Rename the class as in training, add training images for it, or remove it.",
            len(unknown),
        )
        for name in unknown:
            del part[name]
    missing = sorted(set(train) - set(part))
    if missing:
        finding.warn(
            "class-missing",
            f"{split} has no images of {count(len(missing), 'class', 'classes')} {some(missing)}, "
            "so it cannot be tested there.",
            f"Add images of it to {split}.",
            len(missing),
        )


def _warn_look_alikes(finding: LayoutReader, classes: Sequence[str]) -> None:
    """Warn of classes that differ only in letter case or in the way an accent is encoded."""
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for name in classes:
        alike[unicodedata.normalize("NFC", name).casefold()].append(name)
    for names in alike.values():
        if len(names) > 1:
            finding.warn(
                "class-alike",
                f"Classes {some(names)} differ only in letter case and are trained as different classes.",
                "Merge them if they are the same class.",
                len(names),
            )


def _singles(finding: LayoutReader) -> list[str]:
    return sorted(name for name, paths in finding.parts["train"].items() if len(paths) == 1)


def _warn_singles(finding: LayoutReader) -> None:
    if singles := _singles(finding):
        finding.warn(
            "class-tiny",
            f"{count(len(singles), 'class has', 'classes have')} a single training image: {some(singles)}.",
            "Add images of these classes.",
            len(singles),
        )


def _split_off_validation(
    finding: LayoutReader, fraction: float, seed: int, groups: Mapping[str, str]
) -> None:
    """Move part of each class's training images to validation."""
    train = finding.parts["train"]
    if singles := _singles(finding):
        finding.object(
            "class-single",
            f"{count(len(singles), 'class has', 'classes have')} a single image and no validation split is "
            f"given: {some(singles)}; one image cannot be both trained on and tested",
            "Add images of these classes, or give your own validation split (val/, or split=val in the CSV).",
            len(singles),
        )
    _object_to_lonely(finding, train, groups, singles)
    taken = split_off(train, fraction, seed, groups)
    finding.parts["val"] = {name: [p for p in paths if p in taken] for name, paths in train.items()}
    finding.parts["train"] = {name: [p for p in paths if p not in taken] for name, paths in train.items()}


def _object_to_lonely(
    finding: LayoutReader,
    pool: Mapping[str, Sequence[str]],
    groups: Mapping[str, str],
    said: Sequence[str] = (),
) -> None:
    """Refuse classes that no draw can divide."""
    lonely = [name for name in find_undividable(pool, groups) if name not in said]
    if lonely:
        finding.object(
            "group-single",
            f"all images of {count(len(lonely), 'class', 'classes')} {some(lonely)} belong to one group, "
            "or are one; they cannot be both trained on and tested",
            "Add images of other groups, or give your own validation split.",
            len(lonely),
        )


def _deal_folds(
    finding: LayoutReader, num_folds: int, fold: int, seed: int, groups: Mapping[str, str]
) -> dict[str, int]:
    """Deal the images of training and validation into folds; one of them becomes the validation split."""
    pool: defaultdict[str, list[str]] = defaultdict(list)
    for split in ("train", "val"):
        for name, paths in finding.parts.get(split, {}).items():
            pool[name] += paths
    _object_to_lonely(finding, pool, groups)
    folds = draw_folds(pool, num_folds, seed, groups)
    if len(set(folds.values())) < num_folds:
        fault = find_fold_fault(pool, folds, num_folds)
        raise DataError(f"data.folds={num_folds}", str(fault), "Take fewer folds.")
    finding.parts["val"] = {name: [p for p in paths if folds[p] == fold] for name, paths in pool.items()}
    finding.parts["train"] = {name: [p for p in paths if folds[p] != fold] for name, paths in pool.items()}
    if fault := find_fold_fault(pool, folds, num_folds):
        finding.object("fold-empty", fault, FOLD_FIX)
    return folds


# --- Images without labels, for whoever only looks at them: every image below a folder ---


def find_images(
    data: Path, config: SplitConfig, follow_links: bool = False, on_progress: Progress | None = None
) -> Dataset:
    """Return what :func:`finetune.data.discover.discover` finds, or every image of a folder without classes.

    A folder has no classes when it holds fewer than two folders, and none that is called as a part. Its
    images have the label -1, and the data set no classes.

    Raises:
        DataError: there is no image, or what is there has more than one reading.
    """
    if not _is_unlabelled(data):
        return discover(data, config, follow_links, on_progress)
    finding = LayoutReader(f"--data {printable(data)}", data.absolute(), follow_links=follow_links)
    images, _ = images_below(finding, "")
    finding.check_links()
    if not images:
        raise finding.refuse("holds no images", "Give a folder of images or a CSV file.")
    return Dataset(finding.root, (), tuple(Sample(path, -1, "train") for path in images))


def _is_unlabelled(data: Path) -> bool:
    if not data.is_dir():
        return False
    folders = [name for name in names_in(data) if not is_junk(name) and (data / name).is_dir()]
    return len(folders) < 2 and not any(name.lower() in SPLIT_NAMES for name in folders)
