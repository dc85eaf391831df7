"""Read class folders: below ``train/``, ``val/`` and ``test/``, or side by side."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from finetune.data.dataset import SPLITS, Split
from finetune.data.formats import explain_suffix, is_image_name, list_suffixes
from finetune.data.layout import (
    SHOWN,
    SPLIT_NAMES,
    LayoutReader,
    count,
    extension_counts,
    extensions,
    is_junk,
    name_fault,
    printable,
    some,
)


def read_folder(reader: LayoutReader) -> None:
    """Read ``train/`` with ``val/`` and ``test/``, or a flat folder of class folders."""
    folders, files = _listing(reader, "")
    splits = _split_folders(reader, folders)
    if splits:
        _read_splits(reader, folders, splits)
    else:
        _refuse_no_classes(reader, "", folders, files)
        reader.splits["train"] = _read_classes(reader, "", folders, files, "train")
    reader.check_links()


def _read_splits(reader: LayoutReader, folders: Sequence[str], splits: dict[Split, str]) -> None:
    """Read the class folders of each split."""
    others = [name for name in folders if name not in splits.values()]
    if others:
        beside = splits.get("train", next(iter(splits.values())))
        reader.warn(
            "ignored-folder",
            f"Beside {beside!r}, these folders are ignored: {some(others)}.",
            "Remove them, or name them after a split (train, val, test).",
            len(others),
        )
    for split, name in splits.items():
        if _leads_out(reader, name):
            continue
        inside, loose = _listing(reader, name)
        _refuse_no_classes(reader, name, inside, loose)
        reader.splits[split] = _read_classes(reader, name, inside, loose, split)


def _split_folders(reader: LayoutReader, folders: Sequence[str]) -> dict[Split, str]:
    """Return the folder of each split; empty for a flat layout."""
    named: defaultdict[Split, list[str]] = defaultdict(list)
    for name in folders:
        # In any letter case: otherwise Train/ and Val/ would be trained on as two classes.
        if name.lower() in SPLIT_NAMES:
            named[SPLIT_NAMES[name.lower()]].append(name)
    for split, names in named.items():
        if len(names) > 1:
            found = f"has more than one {split} folder: {some(names)}"
            reader.reject("part-twice", found, "Keep one of these folders.", len(names))
    if named and "train" not in named and not reader.for_evaluation:
        raise reader.error(
            f"has {some(names[0] for names in named.values())} but no train folder",
            "Add train/ with a folder for each class; a class that has such a name needs another.",
        )
    splits = {split: named[split][0] for split in SPLITS if split in named}
    _refuse_same_folder(reader, splits)
    return splits


def _refuse_same_folder(reader: LayoutReader, splits: dict[Split, str]) -> None:
    """Refuse two splits that are links to one folder: the model would be tested on training images."""
    seen: dict[tuple[int, int], str] = {}
    for name in splits.values():
        twin = seen.setdefault(_identity(reader, name), name)
        if twin != name:
            found = f"{twin!r} and {name!r} are the same folder"
            reader.reject("part-repeated", found, "Give each split its own images.", 2)


def _refuse_no_classes(reader: LayoutReader, top: str, folders: Sequence[str], files: Sequence[str]) -> None:
    if folders:
        return
    where = f"{top!r} holds" if top else "holds"
    if any(is_image_name(name) for name in files):
        found = f"{where} images but no class folders, so that no image has a label"
    else:
        found = f"{where} no class folders and no images{extensions(extension_counts(files), ', only ')}"
    fix = "Put the images of each class into a folder with the name of the class."
    fix += explain_others(extension_counts(files))
    reader.reject("no-classes", found, fix)


def _read_classes(
    reader: LayoutReader, top: str, folders: Sequence[str], files: Sequence[str], split: Split
) -> dict[str, list[str]]:
    """Return the image paths of each class folder in one split; a class without images is left out.

    Args:
        reader: reports faults.
        top: folder of the split, relative to the root; ``""`` for a flat layout.
        folders: names of the folders in it.
        files: names of the files in it.
        split: the split.
    """
    classes: dict[str, list[str]] = {}
    empty: list[str] = []
    ignored: Counter[str] = Counter()
    unused: Counter[str] = Counter()
    for name in folders:
        folder = f"{top}/{name}" if top else name
        images, others = images_below(reader, folder)
        if images:
            if not _is_good_name(reader, name):
                continue
            classes[name] = images
            ignored += others
        else:
            empty.append(f"{folder!r} holds no images{extensions(others, ', only ')}")
            unused += others
    # Links that lead out were not followed: report the link, and not that images are missing.
    if empty and not reader.links_out and (split == "train" or not classes):
        more = f" (and {len(empty) - SHOWN} more such folders)" if len(empty) > SHOWN else ""
        reader.reject(
            "class-empty",
            f"class folder {'; '.join(empty[:SHOWN])}{more}",
            f"Add images ({list_suffixes()}), or remove the folder.{explain_others(unused)}",
            len(empty),
        )
    warn_ignored(reader, top, files, ignored)
    return classes


def _is_good_name(reader: LayoutReader, name: str) -> bool:
    fault = name_fault(name)
    if fault:
        reader.reject("class-name", f"class folder {name!r}: the name {fault}", "Rename the folder.")
    return not fault


def warn_ignored(reader: LayoutReader, top: str, files: Sequence[str], others: Counter[str]) -> None:
    """Warn about files that a user may believe to be used and that are not."""
    loose = sum(is_image_name(name) for name in files)
    where = repr(top) if top else "the data folder"
    if loose:
        reader.warn(
            "ignored-image",
            f"{count(loose, 'image', 'images')} directly in {where}, outside the class folders, ignored.",
            "Move them into the folders of their classes.",
            loose,
        )
    if others:
        reader.warn(
            "ignored-file",
            f"Files in {where} that are not images are ignored{extensions(others, ': ')}."
            f"{explain_others(others)}",
            f"Convert images among them to one of {list_suffixes()}.",
            sum(others.values()),
        )


def explain_others(others: Counter[str]) -> str:
    """Return how to convert those of some files, by extension, that hold images in another form, or ""."""
    return "".join(f" {suffix} is {told}." for suffix in sorted(others) if (told := explain_suffix(suffix)))


def images_below(reader: LayoutReader, top: str) -> tuple[list[str], Counter[str]]:
    """Return the images in a folder and its sub-folders, and the number of other files by extension.

    Links to folders are followed, except to a folder that the walk is already inside, and out of the root.
    """
    others: Counter[str] = Counter()
    return sorted(walk_images(reader, top, others)), others


def walk_images(
    reader: LayoutReader, top: str, others: Counter[str], left_out: list[str] | None = None
) -> Iterator[str]:
    """Yield the images of :func:`images_below` folder by folder; only one folder is in memory at a time.

    Args:
        reader: gives the root, and records links that lead out of it.
        top: folder below the root; ``""`` for the root.
        others: counts the other files by extension.
        left_out: the paths of the first few other files are added to it.
    """
    outside = frozenset(_identity(reader, above) for above in _above(top))
    stack = [(top, outside)]
    while stack:
        folder, inside = stack.pop()
        if _leads_out(reader, folder):
            continue
        identity = _identity(reader, folder)
        if identity in inside:
            continue
        folders, files = _listing(reader, folder)
        yield from (f"{folder}/{name}".lstrip("/") for name in files if is_image_name(name))
        rest = [name for name in files if not is_image_name(name)]
        others.update(extension_counts(rest))
        if left_out is not None:
            left_out += [f"{folder}/{name}".lstrip("/") for name in rest[: SHOWN - len(left_out)]]
        below = [(f"{folder}/{name}".lstrip("/"), inside | {identity}) for name in folders]
        stack.extend(reversed(below))  # the first folder is visited first


def _above(folder: str) -> Iterator[str]:
    """Yield the folders above this one, up to and including the root (``""``)."""
    while folder:
        folder = folder.rpartition("/")[0]
        yield folder


def _leads_out(reader: LayoutReader, folder: str) -> bool:
    """Return whether a folder is a link out of the root; its target is not read."""
    return os.path.islink(reader.root / folder) and reader.leads_out(folder)  # noqa: PTH114


def _identity(reader: LayoutReader, folder: str) -> tuple[int, int]:
    """Return device and inode, which are the same for a folder and every link to it."""
    try:
        status = (reader.root / folder).stat()
    except OSError as error:
        fix = "Restore the folder, or make it readable."
        raise reader.error(f"the folder {folder!r} cannot be read: {error.strerror}", fix) from None
    return status.st_dev, status.st_ino


def _listing(reader: LayoutReader, folder: str) -> tuple[list[str], list[str]]:
    """Return the names of the folders and files in a folder, each sorted, without hidden ones and junk."""
    folders: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(reader.root / folder) as entries:
            for entry in entries:
                if is_junk(entry.name):
                    continue
                if _is_folder(entry):
                    if _is_utf8(reader, folder, entry.name):
                        folders.append(entry.name)
                elif _counts_as_file(entry):
                    files.append(entry.name)
                    if entry.is_symlink() and is_image_name(entry.name):
                        reader.leads_out(f"{folder}/{entry.name}".lstrip("/"))
    except OSError as error:
        found = f"the folder {printable(folder or '.')!r} cannot be read ({error.strerror})"
        reader.reject("folder-unreadable", found, "Make it readable for this user.")
    files = [name for name in files if not is_image_name(name) or _is_utf8(reader, folder, name)]
    return sorted(folders), sorted(files)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder; a link to itself is not (``is_dir`` would raise)."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()  # noqa: PTH112


def _counts_as_file(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a file, not a pipe or socket; a dead link counts, so that it is reported."""
    if entry.is_symlink():
        return os.path.isfile(entry.path) or not os.path.exists(entry.path)  # noqa: PTH110, PTH113
    return entry.is_file()


def _is_utf8(reader: LayoutReader, folder: str, name: str) -> bool:
    if reader.takes_any_name:
        return True
    try:
        name.encode()
    except UnicodeEncodeError:
        found = f"the name of {f'{folder}/{name}'.lstrip('/')!r} is not UTF-8"
        fix = "Rename it; names go into reports and tables, which are UTF-8."
        reader.reject("name-not-utf8", found, fix)
        return False
    return True
