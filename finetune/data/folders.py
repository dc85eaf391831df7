"""Walk through folders: their images, class by class, without what systems leave and links that lead out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress

from finetune.data.dataset import Split
from finetune.data.formats import explain_suffix, is_image_name, list_suffixes
from finetune.data.layout import (
    SHOWN,
    LayoutReader,
    extension_counts,
    extensions,
    is_junk,
    is_system,
    name_fault,
    printable,
    some,
)
from finetune.errors import count

MOST_WAYS = 100
"""Ways to one folder: folders of links to folders of links double them with each level."""
_LISTS = (".txt", ".csv", ".json", ".mat")


def read_classes(
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
    listed = False
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
            listed = listed or any(others[suffix] for suffix in _LISTS)
            empty.append(f"{folder!r} holds no images{extensions(others, ', only ')}")
            unused += others
    # Links that lead out were not followed: report the link, and not that images are missing.
    if empty and not reader.links_out and (split == "train" or not classes):
        lists = " If it holds lists of labels, give a CSV file with path,label[,split]." if listed else ""
        more = f" (and {len(empty) - SHOWN} more such folders)" if len(empty) > SHOWN else ""
        reader.reject(
            "class-empty",
            f"class folder {'; '.join(empty[:SHOWN])}{more}",
            f"Add images ({list_suffixes()}), or remove the folder.{lists}{explain_others(unused)}",
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
    loose = sum(reader.takes(name) for name in files)
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


def tell_hidden(reader: LayoutReader) -> str:
    """Return a sentence about hidden images, which may be what is missing, or ""."""
    if not reader.hidden:
        return ""
    return f" Hidden images are not read ({some(sorted(reader.hidden))}); rename them if they belong to it."


def explain_others(others: Counter[str]) -> str:
    """Return how to convert those of some files, by extension, that hold images in another form, or ""."""
    return "".join(f" {suffix} is {told}." for suffix in sorted(others) if (told := explain_suffix(suffix)))


def images_below(reader: LayoutReader, top: str) -> tuple[list[str], Counter[str]]:
    """Return the images in a folder and its sub-folders, and the number of other files by extension.

    Links to folders are followed, except to a folder that the walk is already inside, and out of the root.

    Raises:
        DataError: links lead to one folder in more than ``MOST_WAYS`` ways.
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
    outside = frozenset(identity_of(reader, above) for above in _above(top))
    stack, ways = [(top, outside)], Counter[tuple[int, int]]()
    while stack:
        folder, inside = stack.pop()
        if leads_out(reader, folder):
            continue
        identity = identity_of(reader, folder)
        if identity in inside:
            continue
        ways[identity] += 1
        if ways[identity] > MOST_WAYS:
            found = f"links lead to the folder {printable(folder)!r} in more than {MOST_WAYS} ways"
            raise reader.error(found, "Remove links to folders that hold links to folders.")
        folders, files = listing(reader, folder)
        yield from (f"{folder}/{name}".lstrip("/") for name in files if reader.takes(name))
        rest = [name for name in files if not reader.takes(name)]
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


def leads_out(reader: LayoutReader, folder: str, *, record: bool = True) -> bool:
    """Return whether a folder is a link out of the root; its target is not read."""
    if not os.path.islink(reader.root / folder):  # noqa: PTH114
        return False
    return reader.leads_out(folder) if record else reader.outside(folder) is not None


def identity_of(reader: LayoutReader, folder: str) -> tuple[int, int]:
    """Return device and inode, which are the same for a folder and every link to it."""
    try:
        status = (reader.root / folder).stat()
    except OSError as error:
        fix = "Restore the folder, or make it readable."
        raise reader.error(f"the folder {folder!r} cannot be read: {error.strerror}", fix) from None
    return status.st_dev, status.st_ino


def listing(reader: LayoutReader, folder: str) -> tuple[list[str], list[str]]:
    """Return the names of the folders and files in a folder, each sorted, without hidden ones and junk."""
    folders: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(reader.root / folder) as entries:
            for entry in entries:
                if is_junk(entry.name):
                    if not is_system(entry.name) and _holds_image(entry):
                        reader.hidden.add(f"{folder}/{entry.name}".lstrip("/"))
                    continue
                if _is_folder(entry):
                    if _is_utf8(reader, folder, entry.name):
                        folders.append(entry.name)
                elif _counts_as_file(entry):
                    files.append(entry.name)
                    if entry.is_symlink() and reader.takes(entry.name):
                        reader.leads_out(f"{folder}/{entry.name}".lstrip("/"))
    except OSError as error:
        found = f"the folder {printable(folder or '.')!r} cannot be read ({error.strerror})"
        reader.reject("folder-unreadable", found, "Make it readable for this user.")
    files = [name for name in files if not reader.takes(name) or _is_utf8(reader, folder, name)]
    return sorted(folders), sorted(files)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder; a link to itself is not (``is_dir`` would raise)."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()  # noqa: PTH112


def _counts_as_file(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a file, not a pipe or socket; a dead link counts, so that it is reported."""
    if entry.is_symlink():
        return os.path.isfile(entry.path) or not os.path.exists(entry.path)  # noqa: PTH110, PTH113
    return entry.is_file()


def _holds_image(entry: os.DirEntry[str]) -> bool:
    """Return whether a hidden entry is an image, or a folder with one; links are not followed."""
    if entry.is_symlink() or not entry.is_dir():
        return not entry.is_symlink() and is_image_name(entry.name)
    stack = [entry.path]  # os.walk may call itself for each level, and folders may be nested deeply
    while stack:
        with suppress(OSError), os.scandir(stack.pop()) as entries:
            for inner in entries:
                if inner.is_dir(follow_symlinks=False):
                    stack.append(inner.path)
                elif is_image_name(inner.name) and not is_system(inner.name):
                    return True
    return False


# --- a look at one level, without reporting anything ---


def peek(reader: LayoutReader, folder: str) -> tuple[list[str], list[str]]:
    """Return the names of the folders and images in a folder; none behind a link that leads out."""
    folders: list[str] = []
    images: list[str] = []
    if leads_out(reader, folder, record=False):
        return folders, images
    with suppress(OSError), os.scandir(reader.root / folder) as entries:
        for entry in entries:
            if is_junk(entry.name):
                continue
            if _is_folder(entry):
                folders.append(entry.name)
            elif reader.takes(entry.name):
                images.append(entry.name)
    return sorted(folders), sorted(images)


def class_names(reader: LayoutReader, folder: str) -> list[str]:
    """Return the names of the folders in a folder that holds no images itself; else an empty list."""
    folders, images = peek(reader, folder)
    return [] if images else folders


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
