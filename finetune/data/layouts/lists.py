"""Read images whose labels stand in a list beside them, where a folder has no class folders.

- one table (``labels.csv``) beside a folder of images, read as ``--data labels.csv`` is;
- ``_classes.csv`` in each split folder, with a column of 0 and 1 for each class (Roboflow);
- ``images.txt``, ``image_class_labels.txt``, ``classes.txt`` and ``train_test_split.txt`` (CUB).
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from finetune.data.archives.entries import KINDS, SUFFIXES, is_archive, is_unread_archive
from finetune.data.dataset import Split
from finetune.data.folders import class_names, images_below, peek
from finetune.data.layout import LayoutReader, name_fault, names_in, printable, quoted, some
from finetune.data.tables.format import is_table
from finetune.data.tables.rows import read_csv
from finetune.errors import count
from finetune.system.regular_files import open_regular

TABLES = frozenset({".csv", ".tsv"})
"""Extensions of tables that may hold labels."""
ONE_HOT = "_classes.csv"
_IMAGES, _LABELS, _CLASSES, _SPLITS = (
    "images.txt", "image_class_labels.txt", "classes.txt", "train_test_split.txt"
)  # fmt: skip
LIST_FILES = frozenset({_IMAGES, _LABELS, _CLASSES, _SPLITS})
"""Text files that are unpacked from an archive, since they may hold labels."""
_LISTS = TABLES | {".txt", ".json", ".mat", ".xml", ".parquet", ".xlsx", ".xls", ".jsonl"}
_MAX_BYTES = 64 * 2**20


def read_list(
    reader: LayoutReader,
    folders: Sequence[str],
    files: Sequence[str],
    splits: Mapping[Split, str],
    group_by: str | None,
) -> bool:
    """Read a list of labels at the top of the data, if the folders themselves say nothing; return whether.

    Args:
        reader: stores the images, and reports faults.
        folders: names of the folders at the top.
        files: names of the files at the top.
        splits: folders that are named like splits.
        group_by: name of the column that holds group names.
    """
    if {_IMAGES, _LABELS} <= set(files) and "images" in folders:
        _read_numbered(reader)
        return True
    tables = [name for name in files if is_table(name)]
    if len(tables) != 1 or any(class_names(reader, name) for name in folders):
        return False
    if any(ONE_HOT in names_in(reader.root / name) for name in splits.values()):
        return False
    has_images = [name for name in folders if peek(reader, name)[1]]
    is_one = len(has_images) == 1 and (len(folders) == 1 or bool(splits))
    if splits or is_one or (not folders and any(map(reader.takes, files))):
        _read_table(reader, tables[0], group_by)
        return True
    return False


def _read_table(reader: LayoutReader, name: str, group_by: str | None) -> None:
    asked, reader.asked = reader.asked, f"{reader.asked}, list {name!r}"
    read_csv(reader, reader.root / name, group_by)
    reader.asked = asked
    reader.warn(
        "list-read", f"The labels were read from the list {name!r}.", "Remove the list if that is wrong."
    )


def advise_list(reader: LayoutReader, top: str, files: Sequence[str]) -> str:
    """Return what to do about images without class folders; names the lists beside them."""
    if packed := [name for name in files if is_archive(name) or is_unread_archive(name)]:
        if not all(map(is_archive, packed)):
            return f"Unpack {some(packed)}, and give the folder."
        return f"Unpack {some(packed)}, or name one: --data {printable(reader.root / packed[0])}."
    if any(suffix.endswith(SUFFIXES) or suffix in KINDS for suffix in reader.left_out):
        return "Unpack it, and the archives in it, and give the folder."
    fix = "Put the images of each class into a folder with the name of the class."
    return fix + name_lists(reader, top, files)


def name_lists(reader: LayoutReader, top: str, files: Sequence[str]) -> str:
    """Return a sentence about the lists in the folder ``top`` and in the root; "" if there are none."""
    lists = [f"{top}/{name}".lstrip("/") for name in files if _may_be_list(name)]
    if top:
        lists += [name for name in names_in(reader.root) if _may_be_list(name)]
    if reader.beside:
        said = f"{some(reader.beside)} beside the archives may hold the labels"
        return f" Or unpack the archives; {said}."
    if not lists:
        return ""
    said = f"{some(lists)} beside the images may hold the labels."
    return f" Or give a CSV file with path,label[,split]; {said}"


def find_lists(reader: LayoutReader) -> list[str]:
    """Return the files at the top that may hold labels."""
    return [name for name in names_in(reader.root) if _may_be_list(name.removesuffix(".zip"))]


def _may_be_list(name: str) -> bool:
    stem, suffix = Path(name).stem.lower(), Path(name).suffix.lower()
    return (suffix in _LISTS or is_table(name)) and not stem.startswith(
        (".", "readme", "license", "licence", "requirements")
    )


# --- a table of 0 and 1 in each split ---


def read_one_hot(
    reader: LayoutReader, top: str, folders: Sequence[str], files: Sequence[str]
) -> dict[str, list[str]] | None:
    """Return the image paths of each class in a split folder with ``_classes.csv``; None without one.

    Raises:
        DataError: the table is damaged, names missing images, or gives an image no class or several.
    """
    if ONE_HOT not in files or folders:
        return None
    where = f"{top}/{ONE_HOT}"
    try:
        rows = list(csv.reader(_lines(reader, where)))
    except csv.Error as error:
        raise reader.error(f"{where!r} is not a table ({error})", "Export the data set again.") from None
    header = [cell.strip() for cell in rows[0]] if rows else []
    if len(header) < 2:
        raise reader.error(f"{where!r} has no column for a class", "Export the data set again.")
    labels: dict[str, str] = {}
    odd: list[str] = []
    for row in filter(None, rows[1:]):
        chosen = [
            name for name, cell in zip(header[1:], row[1:], strict=False) if cell.strip() in {"1", "1.0"}
        ]
        if len(row) != len(header) or len(chosen) != 1:
            odd.append(row[0])
            continue
        labels[f"{top}/{row[0].strip()}"] = chosen[0]
    if odd:
        found = f"{where!r} gives {count(len(odd), 'image', 'images')} no class or several: {some(odd)}"
        raise reader.error(found, "Leave them out, or give each image one class.")
    found_images = [f"{top}/{name}" for name in files if reader.takes(name)]
    reader.warn(
        "list-read", f"The labels of {top!r} were read from {where!r}.", "Remove it if that is wrong."
    )
    return _by_class(reader, where, found_images, labels)


# --- lists of CUB ---


def _read_numbered(reader: LayoutReader) -> None:
    """Read ``number path``, ``number class``, ``class name`` and ``number is_training``, each in its file."""
    paths = {number: f"images/{path}" for number, path in _pairs(reader, _IMAGES).items()}
    numbers = _pairs(reader, _LABELS)
    here = set(names_in(reader.root))
    names = _pairs(reader, _CLASSES) if _CLASSES in here else {}
    train = _pairs(reader, _SPLITS) if _SPLITS in here else {}
    labels = {path: numbers.get(number, "") for number, path in paths.items()}
    labels = {path: names.get(label, label) for path, label in labels.items()}
    if odd := [path for number, path in paths.items() if train and train.get(number) not in {"0", "1"}]:
        found = f"{_SPLITS!r} says neither 0 nor 1 of {count(len(odd), 'image', 'images')}: {some(odd)}"
        raise reader.error(found, "Complete the list, or remove it to have a split drawn.")
    test = {path for number, path in paths.items() if train.get(number) == "0"}
    images, _ = images_below(reader, "images")
    own = {True: [path for path in images if path in test], False: [p for p in images if p not in test]}
    for is_test, split in ((False, "train"), (True, "test")):
        part = {path: label for path, label in labels.items() if (path in test) == is_test}
        if part:
            reader.splits["test" if split == "test" else "train"] = _by_class(
                reader, _IMAGES, own[is_test], part
            )
    if "train" not in reader.splits:
        reader.reject("no-train", f"has no training images in {_SPLITS!r}", "Correct the list.")
    used = [_IMAGES, _LABELS, *([_CLASSES] if names else []), *([_SPLITS] if train else [])]
    reader.warn("list-read", f"The labels were read from {some(used)}.", "Remove the lists if that is wrong.")


def _pairs(reader: LayoutReader, name: str) -> dict[str, str]:
    """Return the first word of each line, and the rest of the line.

    Raises:
        DataError: a line is something else, or a first word is repeated.
    """
    pairs: dict[str, str] = {}
    for line, text in enumerate(_lines(reader, name), 1):
        key, _, value = text.strip().replace("\t", " ").partition(" ")
        if not key:
            continue
        if not value.strip() or key in pairs:
            found = f"line {line} of {name!r} is no pair of a number and a value, or repeats the number"
            raise reader.error(found, "Correct this line.")
        pairs[key] = value.strip()
    return pairs


def _lines(reader: LayoutReader, name: str) -> list[str]:
    """Return the lines of a list in the data.

    Raises:
        DataError: it is not a file, cannot be read, is too large, is not UTF-8, or is a link that leads out.
    """
    file = reader.root / name
    try:
        if file.is_symlink() and reader.leads_out(name):
            reader.check_links()
            return []
        with open_regular(file) as content:
            text = content.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise reader.error(f"{name!r} has more than {_MAX_BYTES // 2**20} MB", "Give a CSV file.")
        return text.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise reader.error(f"{name!r} is not UTF-8", "Save it as UTF-8.") from None
    except OSError as error:
        raise reader.error(f"{name!r} cannot be read ({error.strerror})", "Make it readable.") from None


def _by_class(
    reader: LayoutReader, where: str, images: Iterable[str], labels: Mapping[str, str]
) -> dict[str, list[str]]:
    """Return the images by their label; only those found in the folder are taken, whatever the list names."""
    found = sorted(images)
    known = set(found)
    if missing := [path for path in labels if path not in known]:
        said = f"{where!r} names {count(len(missing), 'image', 'images')} that do not exist: {some(missing)}"
        reader.reject("row-unusable", said, "Restore them, or remove their lines.", len(missing), missing)
    if faulty := sorted({label for label in labels.values() if name_fault(label)}):
        said = f"the label {quoted(faulty[0])} in {where!r} {name_fault(faulty[0])}"
        reader.reject("class-name", said, "Rename the class.", len(faulty))
    unlisted = [path for path in found if path not in labels]
    if unlisted:
        reader.warn(
            "ignored-image",
            f"{count(len(unlisted), 'image', 'images')} that {where!r} does not name, ignored.",
            "Add them to the list.",
            len(unlisted),
        )
    by_class: dict[str, list[str]] = {}
    for path in found:
        if path in labels and labels[path] not in faulty:
            by_class.setdefault(labels[path], []).append(path)
    return by_class
