"""Read the layouts of a folder: class folders below ``train/``, ``val/`` and ``test/``, or side by side."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.data.archives.entries import archive_stem, is_archive
from finetune.data.dataset import Split
from finetune.data.folders import (
    class_names,
    explain_others,
    identity_of,
    images_below,
    leads_out,
    listing,
    peek,
    read_classes,
    tell_hidden,
)
from finetune.data.layout import LayoutReader, extension_counts, extensions, names_in, some
from finetune.data.layouts.lists import LIST_FILES, advise_list, read_list, read_one_hot
from finetune.data.layouts.split_folders import (
    choose,
    describe,
    find_splits,
    is_filler,
    is_plain,
    parse,
    read_nested,
    refuse_masks,
    refuse_splits_as_classes,
    refuse_unsure_beside,
)
from finetune.data.tables.format import is_table
from finetune.errors import count


def read_folder(reader: LayoutReader, group_by: str | None = None) -> None:
    """Read ``train/`` with ``val/`` and ``test/``, a flat folder of class folders, or images with a list.

    Args:
        reader: stores the images, and reports faults.
        group_by: name of the column that holds group names, if labels come from a table beside the images.
    """
    folders, files = listing(reader, "")
    splits = _split_folders(reader, folders)
    if not read_list(reader, folders, files, splits, group_by):
        if splits:
            _read_splits(reader, folders, files, splits)
        else:
            _refuse_no_classes(reader, "", folders, files)
            reader.splits["train"] = read_classes(reader, "", folders, files, "train")
            refuse_masks(reader, reader.splits["train"])
            read_nested(reader)
    _warn_hidden(reader)
    reader.check_links()


def _read_splits(
    reader: LayoutReader, folders: Sequence[str], files: Sequence[str], splits: dict[Split, str]
) -> None:
    """Read the class folders of each split."""
    _warn_beside(reader, [name for name in folders if name not in splits.values()], files, splits)
    entered = {split: _enter(reader, name, split) for split, name in splits.items()}
    if any(not is_plain(name) for name in entered.values()):
        reader.warn(
            "split-names",
            f"Folders were read as splits by their names: {describe(entered)}.",
            "Rename them if that is wrong.",
            len(entered),
        )
    for split, name in entered.items():
        if leads_out(reader, name):
            continue
        inside, loose = listing(reader, name)
        if (labelled := read_one_hot(reader, name, inside, loose)) is not None:
            reader.splits[split] = labelled
            continue
        if _is_unlabelled_test(reader, name, split, inside):
            _warn_unlabelled(reader, name, inside, loose)
            continue
        _refuse_no_classes(reader, name, inside, loose, split)
        reader.splits[split] = read_classes(reader, name, inside, loose, split)
        if split == "train":
            refuse_splits_as_classes(reader, name, reader.splits["train"])
            refuse_masks(reader, reader.splits["train"])


def _warn_beside(
    reader: LayoutReader, others: Sequence[str], files: Sequence[str], splits: dict[Split, str]
) -> None:
    """Warn about folders and archives beside the splits; refuse one that may be a split."""
    beside = splits.get("train", next(iter(splits.values())))
    refuse_unsure_beside(reader, others, splits)
    if others:
        reader.warn(
            "ignored-folder",
            f"Beside {beside!r}, these folders are ignored: {some(others)}.",
            "Remove them, or name them after a split (train, val, test).",
            len(others),
        )
    packed = [name for name in files if is_archive(name) and parse(archive_stem(name))]
    if packed:
        reader.warn(
            "ignored-file",
            f"Beside {beside!r}, these archives are not read: {some(packed)}.",
            "Unpack them into folders named train, val or test.",
            len(packed),
        )


def _enter(reader: LayoutReader, folder: str, split: Split) -> str:
    """Return the folder with the class folders: also ``train/train`` or ``train/images``, if that is all."""
    while len(inside := class_names(reader, folder)) == 1:
        inner = inside[0]
        word = parse(inner)
        repeats = inner == folder.rpartition("/")[2] or is_filler(inner)
        repeats = repeats or (word is not None and word.is_certain and word.split == split)
        if not repeats or not class_names(reader, f"{folder}/{inner}"):
            break
        folder = f"{folder}/{inner}"
    return folder


_NO_LABEL = frozenset({"unknown", "unlabeled", "unlabelled", "unclassified", "all", "none", "dummy"})


def _is_unlabelled_test(reader: LayoutReader, top: str, split: Split, folders: Sequence[str]) -> bool:
    """Return whether a test folder beside ``train`` says nothing about the classes of its images."""
    if split != "test" or reader.for_evaluation or "train" not in reader.splits:
        return False
    if len(folders) == 1 and folders[0] not in reader.splits["train"]:
        word, own = parse(folders[0]), top.rpartition("/")[2]
        if (
            folders[0].lower() in _NO_LABEL | {own.lower()}
            or is_filler(folders[0])
            or (word and word.is_certain)
        ):
            return True
    return not any(images_below(reader, f"{top}/{name}")[0] for name in folders)


def _warn_unlabelled(reader: LayoutReader, top: str, folders: Sequence[str], files: Sequence[str]) -> None:
    inside = sum(len(images_below(reader, f"{top}/{name}")[0]) for name in folders)
    number = inside + sum(reader.takes(name) for name in files)
    held = f"{count(number, 'image', 'images')} without classes" if number else "no images"
    later = f"; `finetune predict RUN {top}/ --output test.csv` predicts them later" if number else ""
    reader.warn(
        "test-unlabelled",
        f"The test folder {top!r} holds {held}, and is left out{later}.",
        "Put its images into class folders to have them tested, or remove it.",
        max(number, 1),
    )


def _warn_hidden(reader: LayoutReader) -> None:
    if reader.hidden:
        reader.warn(
            "hidden-image",
            f"Hidden images and hidden folders with images are not read: {some(sorted(reader.hidden))}.",
            "Give them names that do not begin with a dot.",
            len(reader.hidden),
        )


def _split_folders(reader: LayoutReader, folders: Sequence[str]) -> dict[Split, str]:
    """Return the folder of each split; empty for a flat layout."""
    named = find_splits(reader, folders)
    for split, names in named.items():
        if len(names) > 1:
            found = f"has more than one {split} folder: {some(names)}"
            reader.reject("part-twice", found, "Keep one of these folders.", len(names))
    splits = {split: names[0] for split, names in named.items()}
    _refuse_same_folder(reader, splits)
    return splits


def _refuse_same_folder(reader: LayoutReader, splits: dict[Split, str]) -> None:
    """Refuse two splits that are links to one folder: the model would be tested on training images."""
    seen: dict[tuple[int, int], str] = {}
    for name in splits.values():
        twin = seen.setdefault(identity_of(reader, name), name)
        if twin != name:
            found = f"{twin!r} and {name!r} are the same folder"
            reader.reject("part-repeated", found, "Give each split its own images.", 2)


def _refuse_no_classes(
    reader: LayoutReader,
    top: str,
    folders: Sequence[str],
    files: Sequence[str],
    split: Split = "train",
) -> None:
    if folders:
        return
    where = f"{top!r} holds" if top else "holds"
    if any(reader.takes(name) for name in files):
        found = f"{where} images but no class folders, so that no image has a label"
    else:
        others = extension_counts(files) + reader.left_out
        found = f"{where} no class folders and no images{extensions(others, ', only ')}"
    fix = advise_list(reader, top, files) + explain_others(extension_counts(files)) + tell_hidden(reader)
    if split == "val" and not reader.for_evaluation:
        fix += f" Or move {top!r} away: a validation split is then drawn from the training images."
    beside = [name for name in peek(reader, "")[0] if name != top and peek(reader, name)[1]]
    if top and split == "train" and beside and not any(map(parse, beside)):
        keep = f"If {top!r} is a class, as {some(beside)}, put them all into one more folder named train."
        fix = f"{keep} Else: {fix}"
    reader.reject("no-classes", found, fix)


def find_inner(reader: LayoutReader, top: str) -> str | None:
    """Return the folder below the single class ``top`` that the data may begin at, or None.

    It holds splits, several folders, or a list beside images.
    """
    if "train" in choose(peek(reader, "")[0]):
        return None
    for _ in range(8):
        folders, images = peek(reader, top)
        lists = [name for name in names_in(reader.root / top) if is_table(name) or name in LIST_FILES]
        if choose(folders) or len(folders) > 1 or (lists and (images or folders)):
            return top
        if len(folders) != 1 or images:
            return None
        top = f"{top}/{folders[0]}"
    return None
