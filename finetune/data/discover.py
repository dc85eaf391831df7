"""Find images and labels in a folder or a CSV file, and refuse whatever would give a wrong number.

Three layouts, one list: ``train/<class>/`` (with or without ``val/`` and ``test/``), ``<class>/`` alone, and
a CSV file ``path,label[,split]``. The class list comes from the training part alone, so that a class that
validation lacks shifts no index. Nothing is ever written into the user's folder.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.data.decode import EXTENSIONS
from finetune.data.sample import SPLITS, Dataset, Sample, Split
from finetune.data.split import split_off
from finetune.errors import DataError, suggest

if TYPE_CHECKING:
    from pandas import DataFrame

_SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
_JUNK = frozenset({"__MACOSX", "Thumbs.db"})
_SHOWN = 5


@dataclass
class _Finding:
    """What a reader found, before the rules common to all layouts are applied.

    Attributes:
        asked: the user's own words, for every refusal.
        root: folder that all paths are relative to.
        parts: paths of each class of each part; a part that is absent was not given.
    """

    asked: str
    root: Path
    parts: dict[Split, dict[str, list[str]]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def refuse(self, found: str, fix: str) -> DataError:
        return DataError(self.asked, found, fix)


def discover(data: Path, val_fraction: float, seed: int) -> Dataset:
    """Return every image below ``data`` (a folder, or a CSV file) with its class and part.

    Args:
        data: folder with ``train/``, flat folder of class folders, or CSV file with ``path,label[,split]``.
        val_fraction: share of each class's training images to validate on, where ``data`` gives no
            validation part.
        seed: chooses which ones.

    Raises:
        DataError: there is nothing to train on, or what is there has more than one reading.
    """
    finding = _Finding(f"--data {_printable(data)}", data.absolute())
    if not os.path.exists(data):  # noqa: PTH110 (Path.exists raises below a closed folder)
        siblings = _names_in(finding.root.parent)
        raise finding.refuse(
            f"does not exist{suggest(data.name, siblings)}", "Give a folder of images or a CSV file."
        )
    if data.is_dir():
        _read_folder(finding)
    elif data.suffix.lower() == ".csv" and data.is_file():
        finding.root = finding.root.parent
        _read_csv(finding, data)
    else:
        raise finding.refuse(
            "is neither a folder nor a CSV file",
            "Give a folder of class folders (unpack an archive first) or a CSV file with path,label[,split].",
        )
    return _dataset(finding, val_fraction, seed)


def _printable(text: object) -> str:
    """Return text that any terminal takes: bytes that are not UTF-8 become escapes."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208
    except OSError:
        return []


def _some(names: Iterable[str]) -> str:
    """Return the first few names, quoted, and how many more there are."""
    every = [repr(name) for name in names]
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more


# Rules for every layout


def _dataset(finding: _Finding, val_fraction: float, seed: int) -> Dataset:
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


def _require_two(finding: _Finding, classes: Sequence[str]) -> None:
    if len(classes) >= 2:
        return
    # An archive unpacked into a folder of its own name is the usual reason.
    inside = finding.root / classes[0]
    nested = any(name.lower() == "train" for name in _names_in(inside))
    fix = (
        f"Did you mean --data {_printable(inside)}?"
        if nested
        else "Add the images of at least one more class."
    )
    raise finding.refuse(f"has only one class, {classes[0]!r}, which leaves nothing to tell apart", fix)


def _compare_with_training(finding: _Finding, split: Split) -> None:
    """Refuse classes that training does not know; warn of those that this part lacks."""
    train, part = finding.parts["train"], finding.parts[split]
    unknown = sorted(set(part) - set(train))
    if unknown:
        raise finding.refuse(
            f"{split} has {_count(len(unknown), 'class', 'classes')} that training does not have: "
            f"{_some(unknown)}{suggest(unknown[0], sorted(train))}",
            "Rename the class as in training, add training images for it, or remove it.",
        )
    missing = sorted(set(train) - set(part))
    if missing:
        finding.warnings.append(
            f"{split} has no images of {_count(len(missing), 'class', 'classes')} {_some(missing)}, "
            "so nothing can be said about it there."
        )


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _warn_look_alikes(finding: _Finding, classes: Sequence[str]) -> None:
    """Warn of classes that differ only in letter case or in the way an accent is encoded."""
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for name in classes:
        alike[unicodedata.normalize("NFC", name).casefold()].append(name)
    finding.warnings.extend(
        f"Classes {_some(names)} differ only in letter case and are trained as different classes."
        for names in alike.values()
        if len(names) > 1
    )


def _singles(finding: _Finding) -> list[str]:
    return sorted(name for name, paths in finding.parts["train"].items() if len(paths) == 1)


def _warn_singles(finding: _Finding) -> None:
    if singles := _singles(finding):
        finding.warnings.append(
            f"{_count(len(singles), 'class has', 'classes have')} a single training image: {_some(singles)}."
        )


def _split_off_validation(finding: _Finding, fraction: float, seed: int) -> None:
    """Move part of each class's training images to validation."""
    if singles := _singles(finding):
        raise finding.refuse(
            f"{_count(len(singles), 'class has', 'classes have')} a single image and no validation part is "
            f"given: {_some(singles)}; one image cannot be both trained on and judged",
            "Add images of these classes, or give your own validation part (val/, or split=val in the CSV).",
        )
    train = finding.parts["train"]
    taken = split_off(train, fraction, seed)
    finding.parts["val"] = {name: [p for p in paths if p in taken] for name, paths in train.items()}
    finding.parts["train"] = {name: [p for p in paths if p not in taken] for name, paths in train.items()}


def _name_fault(name: str) -> str | None:
    """Say why a class cannot have this name, or return None. Names end up in files, tables and folders."""
    if not name.strip():
        return "is empty"
    if name in {".", ".."} or "/" in name or "\\" in name:
        return "is a path, not a name"
    if any(unicodedata.category(char) in {"Cc", "Zl", "Zp"} for char in name):
        return "holds a control character or a line break"
    return None


# Folders


def _read_folder(finding: _Finding) -> None:
    """Read ``train/`` with ``val/`` and ``test/``, or a flat folder of class folders."""
    folders, files = _listing(finding, "")
    splits = _split_folders(finding, folders)
    if not splits:
        _refuse_no_classes(finding, "", folders, files)
        finding.parts["train"] = _read_classes(finding, "", folders, files, "train")
        return
    others = [name for name in folders if name not in splits.values()]
    if others:
        finding.warnings.append(f"Beside {splits['train']!r}, these folders are ignored: {_some(others)}.")
    for split, name in splits.items():
        inside, loose = _listing(finding, name)
        _refuse_no_classes(finding, name, inside, loose)
        finding.parts[split] = _read_classes(finding, name, inside, loose, split)


def _split_folders(finding: _Finding, folders: Sequence[str]) -> dict[Split, str]:
    """Return which folder is which part: ``{}`` for a flat layout."""
    named: defaultdict[Split, list[str]] = defaultdict(list)
    for name in folders:
        # In any letter case: Train/ and Val/ taken for two classes would train, and mean nothing.
        if name.lower() in _SPLIT_NAMES:
            named[_SPLIT_NAMES[name.lower()]].append(name)
    for split, names in named.items():
        if len(names) > 1:
            raise finding.refuse(
                f"has more than one {split} part: {_some(names)}", "Keep one of these folders."
            )
    if named and "train" not in named:
        raise finding.refuse(
            f"has {_some(names[0] for names in named.values())} but no train folder",
            "Add train/ with a folder for each class; a class that has such a name needs another.",
        )
    splits = {split: named[split][0] for split in SPLITS if split in named}
    _refuse_same_folder(finding, splits)
    return splits


def _refuse_same_folder(finding: _Finding, splits: dict[Split, str]) -> None:
    """Refuse two parts that are links to one folder: training images would be judged on."""
    seen: dict[tuple[int, int], str] = {}
    for name in splits.values():
        twin = seen.setdefault(_identity(finding, name), name)
        if twin != name:
            raise finding.refuse(
                f"{twin!r} and {name!r} are the same folder", "Give each part its own images."
            )


def _refuse_no_classes(finding: _Finding, part: str, folders: Sequence[str], files: Sequence[str]) -> None:
    if folders:
        return
    where = f"{part!r} holds" if part else "holds"
    if any(_is_image(name) for name in files):
        found = f"{where} images but no class folders, so that no image has a label"
    else:
        found = f"{where} no class folders and no images{_extensions(_extension_counts(files), ', only ')}"
    raise finding.refuse(found, "Put the images of each class into a folder with the name of the class.")


def _read_classes(
    finding: _Finding, part: str, folders: Sequence[str], files: Sequence[str], split: Split
) -> dict[str, list[str]]:
    """Return the image paths of each class folder in one part; a class without images is left out."""
    classes: dict[str, list[str]] = {}
    empty: list[str] = []
    ignored: Counter[str] = Counter()
    for name in folders:
        top = f"{part}/{name}" if part else name
        images, others = _images_below(finding, top)
        if images:
            _refuse_bad_name(finding, name)
            classes[name] = images
            ignored += others
        else:
            empty.append(f"{top!r} holds no images{_extensions(others, ', only ')}")
    if empty and (split == "train" or not classes):
        more = f" (and {len(empty) - _SHOWN} more such folders)" if len(empty) > _SHOWN else ""
        raise finding.refuse(
            f"class folder {'; '.join(empty[:_SHOWN])}{more}",
            f"Add images ({' '.join(sorted(EXTENSIONS))}), or remove the folder.",
        )
    _warn_ignored(finding, part, files, ignored)
    return classes


def _refuse_bad_name(finding: _Finding, name: str) -> None:
    if fault := _name_fault(name):
        raise finding.refuse(f"class folder {name!r}: the name {fault}", "Rename the folder.")


def _warn_ignored(finding: _Finding, part: str, files: Sequence[str], others: Counter[str]) -> None:
    """Say what a user may believe to be trained on and is not."""
    loose = sum(_is_image(name) for name in files)
    where = repr(part) if part else "the data folder"
    if loose:
        finding.warnings.append(
            f"{_count(loose, 'image', 'images')} directly in {where}, outside the class folders, ignored."
        )
    if others:
        finding.warnings.append(
            f"Files in {where} that are no images are ignored{_extensions(others, ': ')}."
        )


def _extension_counts(files: Iterable[str]) -> Counter[str]:
    return Counter(os.path.splitext(name)[1].lower() or "no extension" for name in files)  # noqa: PTH122


def _extensions(others: Counter[str], before: str) -> str:
    """Return ``before`` and the extensions seen with their numbers, or nothing if there were none."""
    seen = ", ".join(f"{_printable(name)} ({number})" for name, number in others.most_common(_SHOWN))
    return before + seen if seen else ""


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS  # noqa: PTH122


def _images_below(finding: _Finding, top: str) -> tuple[list[str], Counter[str]]:
    """Return the images in a class folder and its sub-folders, and how many other files of each extension.

    Linked folders are followed, but not back into a folder that the walk is already inside of.
    """
    images: list[str] = []
    others: Counter[str] = Counter()
    outside = frozenset(_identity(finding, above) for above in _above(top))
    stack = [(top, outside)]
    while stack:
        folder, inside = stack.pop()
        identity = _identity(finding, folder)
        if identity in inside:
            continue
        folders, files = _listing(finding, folder)
        images.extend(f"{folder}/{name}" for name in files if _is_image(name))
        others += _extension_counts(name for name in files if not _is_image(name))
        stack.extend((f"{folder}/{name}", inside | {identity}) for name in folders)
    return sorted(images), others


def _above(folder: str) -> Iterator[str]:
    """Give the folders above this one, up to and with the root (``""``)."""
    while folder:
        folder = folder.rpartition("/")[0]
        yield folder


def _identity(finding: _Finding, folder: str) -> tuple[int, int]:
    """Return device and inode: the same for a folder and every link to it."""
    status = (finding.root / folder).stat()
    return status.st_dev, status.st_ino


def _listing(finding: _Finding, folder: str) -> tuple[list[str], list[str]]:
    """Return the folders and the files in a folder, each sorted, without hidden ones and junk."""
    folders: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(finding.root / folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name in _JUNK:
                    continue
                if _is_folder(entry):
                    _refuse_not_utf8(finding, folder, entry.name)
                    folders.append(entry.name)
                elif _counts_as_file(entry):
                    files.append(entry.name)
    except OSError as error:
        raise finding.refuse(
            f"the folder {_printable(folder or '.')!r} cannot be read ({error.strerror})",
            "Make it readable for this user.",
        ) from error
    for name in files:
        if _is_image(name):
            _refuse_not_utf8(finding, folder, name)
    return sorted(folders), sorted(files)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Tell folders; a link that leads to itself is none (``is_dir`` would raise)."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()  # noqa: PTH112


def _counts_as_file(entry: os.DirEntry[str]) -> bool:
    """Tell files from pipes and sockets; a dead link counts, for the check to name it."""
    if entry.is_symlink():
        return os.path.isfile(entry.path) or not os.path.exists(entry.path)  # noqa: PTH110, PTH113
    return entry.is_file()


def _refuse_not_utf8(finding: _Finding, folder: str, name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise finding.refuse(
            f"the name of {f'{folder}/{name}'.lstrip('/')!r} is not UTF-8",
            "Rename it; names go into reports and tables, which are UTF-8.",
        ) from None


# CSV


@dataclass
class _Row:
    """One row of the CSV, cleaned: ``place`` is its position in the table, from 0."""

    place: int
    path: str
    label: str
    split: str


def _read_csv(finding: _Finding, file: Path) -> None:
    """Read ``path,label[,split]``; show the first few faults of all rows at once, with line numbers."""
    table = _table(finding, file)
    faults: list[tuple[int, str]] = []
    first: dict[str, _Row] = {}
    for row in _rows(finding, table):
        path = _below_root(finding.root, row.path)
        fault = _row_fault(finding.root, row, path, first)
        if fault:
            faults.append((row.place, fault))
        elif path is not None:
            first[path] = row
            part = finding.parts.setdefault(_SPLIT_NAMES[row.split], {})
            part.setdefault(row.label, []).append(path)
    if faults:
        shown = [f"line {_line(table, place)}: {fault}" for place, fault in faults[:_SHOWN]]
        more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
        raise finding.refuse(
            f"{_count(len(faults), 'row', 'rows')} cannot be used:"
            + "".join(f"\n  {s}" for s in shown + more),
            "Correct these lines.",
        )
    if "train" not in finding.parts:
        raise finding.refuse(
            "has no training rows", "Add rows (with split=train, if there is a split column)."
        )


def _table(finding: _Finding, file: Path) -> DataFrame:
    """Return the file as text cells, header included, blank lines left out; the index keeps its positions."""
    from pandas import read_csv
    from pandas.errors import EmptyDataError, ParserError

    try:
        # Without a header of its own pandas holds every row to the width of the first: a stray comma
        # is an error instead of a silent shift of all columns by one.
        table = read_csv(
            file, header=None, dtype=str, keep_default_na=False, na_filter=False, encoding="utf-8-sig",
            skip_blank_lines=False, skipinitialspace=True,
        )  # fmt: skip
    except EmptyDataError:
        raise finding.refuse("has an empty first line", "Start it with the header path,label.") from None
    except UnicodeDecodeError as error:
        raise finding.refuse(
            f"is not UTF-8 ({error.reason} at byte {error.start})", "Save it as UTF-8."
        ) from error
    except ParserError as error:
        said = " ".join(str(error).split()).removeprefix("Error tokenizing data. C error: ")
        raise finding.refuse(f"is not a table ({said})", "Quote cells that hold commas.") from error
    except OSError as error:
        raise finding.refuse(f"cannot be read ({error.strerror})", "Make the file readable.") from error
    return table[(table != "").any(axis=1)]


def _rows(finding: _Finding, table: DataFrame) -> Iterator[_Row]:
    """Give the rows below the header, label and split cleaned; without a split column all are training."""
    header = [str(cell).strip() for cell in table.iloc[0]] if len(table) else []
    _require_columns(finding, header)
    body = table.iloc[1:]
    labels = body[header.index("label")].str.strip()
    splits = (
        body[header.index("split")].str.strip().str.lower() if "split" in header else ["train"] * len(body)
    )
    cells = zip(body.index, body[header.index("path")], labels, splits, strict=True)
    for place, path, label, split in cells:
        yield _Row(int(place), path, label, split)


def _require_columns(finding: _Finding, header: Sequence[str]) -> None:
    missing = [name for name in ("path", "label") if name not in header]
    twice = [name for name in ("path", "label", "split") if header.count(name) > 1]
    if twice:
        raise finding.refuse(f"has more than one column {twice[0]!r}", "Keep one of them.")
    if missing:
        near = "".join(
            f"; for {name!r}{suggest(name, header)[1:]}" for name in missing if suggest(name, header)
        )
        commas = " with commas between the cells" if any(mark in c for c in header for mark in ";\t|") else ""
        raise finding.refuse(
            f"has no column {' and no column '.join(map(repr, missing))} (columns: {_some(header)}{near})",
            f"Write path,label[,split] into the first line{commas}.",
        )


def _below_root(root: Path, path: str) -> str | None:
    """Return the path relative to the CSV's folder in plain form, or None if it lies outside."""
    if not path:
        return None
    full = os.path.normpath(root / path)
    for plain in (os.path.normpath, os.path.realpath):  # the second for absolute paths through a link
        top = plain(root)
        if full.startswith(os.path.join(top, "")):  # noqa: PTH118
            return Path(full).relative_to(top).as_posix()
    return None


def _row_fault(root: Path, row: _Row, path: str | None, first: dict[str, _Row]) -> str | None:
    """Say what is wrong with a row, or return None."""
    if not row.path:
        return "the path is empty"
    if fault := _name_fault(row.label):
        return f"the label {row.label!r} {fault}"
    if row.split not in _SPLIT_NAMES:
        return f"split {row.split!r} is none of train, val, test{suggest(row.split, _SPLIT_NAMES)}"
    if path is None:
        return f"{row.path!r} lies outside the folder of the CSV file"
    if path in first:
        return _repeated(row, first[path])
    return None if (root / path).is_file() else f"{row.path!r} does not exist or is not a file"


def _repeated(row: _Row, before: _Row) -> str:
    """Say how a path came up before: in the other part is the grave one."""
    if _SPLIT_NAMES[row.split] != _SPLIT_NAMES[before.split]:
        return f"{row.path!r} is in {before.split} and again in {row.split}"
    return f"{row.path!r} is listed twice"


def _line(table: DataFrame, place: int) -> int:
    """Return the line of the file where a row starts, from 1: quoted cells may hold line breaks."""
    above = table[table.index < place]
    return 1 + place + sum(int(above[column].str.count("\n").sum()) for column in above.columns)
