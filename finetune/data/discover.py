"""Find images and labels in a folder or a CSV file, and refuse whatever would give a wrong number.

Three layouts, one list: ``train/<class>/`` (with or without ``val/`` and ``test/``), ``<class>/`` alone, and
a CSV file ``path,label[,split]``; the folders may come in a zip archive. The class list comes from the
training part alone, so that a class that validation lacks shifts no index. Nothing is ever written into the
user's folder.
"""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from finetune.data.archive import KINDS, Progress, open_archive
from finetune.data.finding import Finding, count, names_in, printable, some
from finetune.data.folders import read_folder
from finetune.data.sample import SPLITS, Dataset, Sample, Split
from finetune.data.split import split_off
from finetune.data.table import read_csv
from finetune.errors import DataError, suggest


def discover(
    data: Path,
    val_fraction: float,
    seed: int,
    follow_links: bool = False,
    on_progress: Progress | None = None,
) -> Dataset:
    """Return every image below ``data`` (a folder, a zip archive or a CSV file) with its class and part.

    Args:
        data: folder with ``train/``, flat folder of class folders, a zip archive of either, or CSV file with
            ``path,label[,split]``.
        val_fraction: share of each class's training images to validate on, where ``data`` gives no
            validation part.
        seed: chooses which ones.
        follow_links: read images through links that lead out of the folder.
        on_progress: called with the entries done and their number while an archive is unpacked.

    Raises:
        DataError: there is nothing to train on, or what is there has more than one reading.
        DiskError: an archive cannot be unpacked for lack of space or permission.
    """
    finding = Finding(f"--data {printable(data)}", data.absolute(), follow_links=follow_links)
    is_table = read_data(finding, data, on_progress)
    drawn = "val" not in finding.parts
    dataset = _dataset(finding, val_fraction, seed)
    return replace(dataset, is_folder=not is_table, val_was_drawn=drawn)


def read_data(finding: Finding, data: Path, on_progress: Progress | None = None) -> bool:
    """Read a folder, a zip archive or a CSV file; return whether it was a CSV file.

    Raises:
        DataError: it is none of them, or cannot be read.
    """
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
        read_csv(finding, data)
    elif suffix == ".zip":
        finding.root, finding.from_archive = open_archive(finding, data, on_progress), True
        read_folder(finding)
    else:
        raise _refuse_kind(finding, suffix)
    return suffix == ".csv"


def _refuse_kind(finding: Finding, suffix: str) -> DataError:
    if suffix in KINDS:
        return finding.refuse(
            f"is a {KINDS[suffix]} archive, and only zip is read",
            "Unpack it first, and give the folder.",
        )
    return finding.refuse(
        "is neither a folder, a zip archive nor a CSV file",
        "Give a folder of class folders, a zip archive of it, or a CSV file with path,label[,split].",
    )


def _dataset(finding: Finding, val_fraction: float, seed: int) -> Dataset:
    """Apply the rules that do not depend on the layout, and number the classes."""
    train = finding.parts["train"]
    # Plain code-point order, as torchvision's ImageFolder: indices of other people's models stay valid.
    classes = tuple(sorted(train))
    _require_two(finding, classes)
    for split in ("val", "test"):
        if split in finding.parts:
            _compare_with_training(finding, split)
    _warn_look_alikes(finding, classes)
    if "val" in finding.parts:
        _warn_singles(finding)
    else:
        _split_off_validation(finding, val_fraction, seed)
    index = {name: number for number, name in enumerate(classes)}
    samples = [
        Sample(path, index[name], split)
        for split in SPLITS
        for path, name in sorted((p, name) for name, ps in finding.parts.get(split, {}).items() for p in ps)
    ]
    return Dataset(finding.root, classes, tuple(samples), tuple(finding.warnings))


def _require_two(finding: Finding, classes: Sequence[str]) -> None:
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
    raise finding.refuse(f"has only one class, {classes[0]!r}, which leaves nothing to tell apart", fix)


def _compare_with_training(finding: Finding, split: Split) -> None:
    """Refuse classes that training does not know; warn of those that this part lacks."""
    train, part = finding.parts["train"], finding.parts[split]
    unknown = sorted(set(part) - set(train))
    if unknown:
        raise finding.refuse(
            f"{split} has {count(len(unknown), 'class', 'classes')} that training does not have: "
            f"{some(unknown)}{suggest(unknown[0], sorted(train))}",
            "Rename the class as in training, add training images for it, or remove it.",
        )
    missing = sorted(set(train) - set(part))
    if missing:
        finding.warnings.append(
            f"{split} has no images of {count(len(missing), 'class', 'classes')} {some(missing)}, "
            "so nothing can be said about it there."
        )


def _warn_look_alikes(finding: Finding, classes: Sequence[str]) -> None:
    """Warn of classes that differ only in letter case or in the way an accent is encoded."""
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for name in classes:
        alike[unicodedata.normalize("NFC", name).casefold()].append(name)
    finding.warnings.extend(
        f"Classes {some(names)} differ only in letter case and are trained as different classes."
        for names in alike.values()
        if len(names) > 1
    )


def _singles(finding: Finding) -> list[str]:
    return sorted(name for name, paths in finding.parts["train"].items() if len(paths) == 1)


def _warn_singles(finding: Finding) -> None:
    if singles := _singles(finding):
        finding.warnings.append(
            f"{count(len(singles), 'class has', 'classes have')} a single training image: {some(singles)}."
        )


def _split_off_validation(finding: Finding, fraction: float, seed: int) -> None:
    """Move part of each class's training images to validation."""
    if singles := _singles(finding):
        raise finding.refuse(
            f"{count(len(singles), 'class has', 'classes have')} a single image and no validation part is "
            f"given: {some(singles)}; one image cannot be both trained on and judged",
            "Add images of these classes, or give your own validation part (val/, or split=val in the CSV).",
        )
    train = finding.parts["train"]
    taken = split_off(train, fraction, seed)
    finding.parts["val"] = {name: [p for p in paths if p in taken] for name, paths in train.items()}
    finding.parts["train"] = {name: [p for p in paths if p not in taken] for name, paths in train.items()}
