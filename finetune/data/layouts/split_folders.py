"""Recognise the names of split folders: ``Training``, ``test_set``, ``Train Images``, ``seg_train``.

A name is certain if it holds one word for a split and nothing else but words such as "set", "data" or
"images", or numbers. A name with a further word (``seg_train``, ``train_station``) may be a class: it is
taken only beside another split with the same further word, and never by itself.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import NamedTuple

from finetune.data.dataset import SPLITS, Split
from finetune.data.folders import class_names, peek
from finetune.data.layout import SPLIT_NAMES, LayoutReader, printable, some

WORDS: dict[str, Split] = {
    "train": "train", "training": "train", "trn": "train", "trainval": "train", "trainvalid": "train",
    "val": "val", "valid": "val", "validation": "val", "validate": "val", "validating": "val", "dev": "val",
    "vali": "val", "eval": "val", "evaluation": "val",
    "test": "test", "testing": "test", "tst": "test", "tests": "test",
}  # fmt: skip
"""Words for a split. ``eval`` also names test splits: see :func:`is_unsure`."""
UNSURE = frozenset(
    {"eval", "evaluation", "holdout", "heldout", "development", "cv", "crossval", "crossvalidation"}
)
"""Words for images that are held out, without saying what for."""
_FILLERS = (
    "sets", "set", "datasets", "dataset", "database", "data", "images", "image", "imgs", "img", "pictures",
    "pics", "pic", "photos", "photo", "folders", "folder", "directory", "dir", "splits", "split", "subset",
    "partition", "files", "samples", "examples", "classes",
)  # fmt: skip
_FILLER = f"(?:{'|'.join(_FILLERS)}|[0-9]+)*"
_CERTAIN = re.compile(f"{_FILLER}({'|'.join(sorted(WORDS, key=len, reverse=True))}){_FILLER}")
_PARTS = re.compile(r"[^\W_]+")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


class SplitName(NamedTuple):
    """A folder's name that holds a word for a split.

    Attributes:
        name: the whole name.
        split: the split that the word stands for.
        rest: the further words; empty if the name cannot mean anything else.
        word: the word.
    """

    name: str
    split: Split
    rest: tuple[str, ...]
    word: str

    @property
    def is_certain(self) -> bool:
        """Whether the name can only be that of a split."""
        return not self.rest


def parse(name: str) -> SplitName | None:
    """Return what a folder's name says about a split, or None if it says nothing."""
    plain = unicodedata.normalize("NFC", name)
    words = [word.casefold() for word in _PARTS.findall(_CAMEL.sub(" ", plain))]
    if found := _CERTAIN.fullmatch("".join(words)):
        return SplitName(name, WORDS[found[1]], (), found[1])
    roles = [word for word in words if word in WORDS]
    if len(roles) != 1:
        return None
    rest = tuple(word for word in words if word != roles[0])
    return SplitName(name, WORDS[roles[0]], rest, roles[0])


def parse_all(names: Iterable[str]) -> list[SplitName]:
    """Return the names that hold a word for a split, in order."""
    return [found for name in names if (found := parse(name))]


def is_plain(name: str) -> bool:
    """Return whether a name is one of the documented ones, in any letter case."""
    return name.lower() in SPLIT_NAMES


def is_filler(name: str) -> bool:
    """Return whether a name says no more than that images are in the folder: ``images``, ``data``."""
    return re.fullmatch(f"(?:{'|'.join(_FILLERS)})+", "".join(_PARTS.findall(name.casefold()))) is not None


def is_unsure(name: str) -> bool:
    """Return whether a name says that images are held out, but not whether for validation or for testing."""
    return "".join(_PARTS.findall(name.casefold())) in UNSURE


def choose(names: Iterable[str]) -> dict[Split, list[str]]:
    """Return the folders that are a split's beyond doubt, by split; empty without a training split.

    A documented name (``train``, ``val``) comes before others of its split. Several names for one split are
    all returned, as it is not clear which is meant.
    """
    found = parse_all(names)
    chosen = _by_split(one for one in found if one.is_certain)
    if "train" not in chosen:
        rests = dict.fromkeys(one.rest for one in found if one.split == "train")
        group = _by_split(one for one in found if one.rest in rests)
        if len(rests) == 1 and len(group) > 1:
            return group
    return chosen


def _by_split(names: Iterable[SplitName]) -> dict[Split, list[str]]:
    by_split: defaultdict[Split, list[str]] = defaultdict(list)
    for one in names:
        by_split[one.split].append(one.name)
    for split, own in by_split.items():
        by_split[split] = [name for name in own if is_plain(name)] or own
    return {split: by_split[split] for split in SPLITS if split in by_split}


def describe(splits: Mapping[Split, str]) -> str:
    """Return which folder was read as which split: ``'Training' as train, 'Testing' as test``."""
    return ", ".join(f"{printable(name)!r} as {split}" for split, name in splits.items())


# --- what the folders hold, beside what they are called ---


def find_splits(reader: LayoutReader, folders: Sequence[str]) -> dict[Split, list[str]]:
    """Return the names of each split's folders; empty where the folders are classes.

    Raises:
        DataError: the folders may be splits or classes, or there is no training split.
    """
    named = choose(folders)
    plain = {split: names for split, names in named.items() if is_plain(names[0])}
    if "train" in plain:
        return named
    if "train" in named and _is_training_folder(reader, named, folders):
        return named
    if reader.for_evaluation and "train" not in named:
        return plain or {split: own for split, own in named.items() if class_names(reader, own[0])}
    if plain:
        raise reader.error(
            f"has {some(names[0] for names in plain.values())} but no train folder",
            "Add train/ with a folder for each class; a class that has such a name needs another.",
        )
    _refuse_look_alike(reader, folders)
    return {}


def _is_training_folder(
    reader: LayoutReader, named: Mapping[Split, list[str]], folders: Sequence[str]
) -> bool:
    """Return whether a folder such as ``Training`` holds class folders, and nothing beside it is a class."""
    if not all(class_names(reader, name) for name in named["train"]):
        return False
    taken = {name for names in named.values() for name in names}
    if len(named) > 1:
        return True
    return not any(any(peek(reader, name)) for name in folders if name not in taken)


_FIX = (
    "If they are splits, name them train, val and test. If they are classes, put their folders into a folder "
    "named train."
)


def _refuse_look_alike(reader: LayoutReader, folders: Sequence[str]) -> None:
    """Refuse folders of a flat layout whose names look like splits, where a few classes are less likely."""
    words = parse_all(folders)
    kinds = {word.split for word in words}
    sure = {word.split for word in words if word.is_certain}
    in_train = any(
        class_names(reader, word.name) for word in words if word.split == "train" and word.is_certain
    )
    # The same further word in two splits: cat_train, cat_test, dog_train, dog_test.
    pairs = any(
        len({other.split for other in words if other.rest == word.rest}) > 1 and word.split == "train"
        for word in words
    )
    if (len(kinds) > 1 and (pairs or len(words) == len(folders) or len(sure) > 1)) or in_train:
        names = some(word.name for word in words)
        found = f"has folders that look like splits, {names}, and it is not clear that they are"
        raise reader.error(found, _FIX)


def refuse_unsure_beside(reader: LayoutReader, others: Sequence[str], splits: Mapping[Split, str]) -> None:
    """Refuse a folder beside the splits that may be the missing one: its classes are those of training.

    Raises:
        DataError: there is such a folder.
    """
    if "train" not in splits or {"val", "test"} <= splits.keys():
        return
    train = set(class_names(reader, splits["train"]))
    for name in others:
        word = parse(name)
        is_missing = word is not None and word.split not in splits
        missing = [known for known, split in SPLIT_NAMES.items() if split not in splits]
        is_missing = is_missing or (not word and bool(get_close_matches(name.casefold(), missing, 1, 0.75)))
        own = set(class_names(reader, name))
        # Beside train alone, a folder with the same classes is hardly anything else, whatever its name.
        is_same = len(splits) == 1 and len(train & own) > 1 and 2 * len(train & own) > len(train | own)
        if is_same or ((is_missing or is_unsure(name)) and train & own):
            raise reader.error(
                f"has {name!r} beside {splits['train']!r}: it may be a split or not",
                "Rename it to val or test, or move it out of the folder.",
            )


def refuse_splits_as_classes(reader: LayoutReader, top: str, classes: Iterable[str]) -> None:
    """Refuse class folders that are all named like splits, as in ``train/train`` beside ``train/test``.

    Raises:
        DataError: they are.
    """
    words = [parse(name) for name in classes]
    if len(words) > 1 and all(word is not None and word.is_certain for word in words):
        found = f"the classes in {top!r} would be {some(classes)}, which look like splits"
        raise reader.error(
            found, f"Give the folder with the splits itself, if {printable(top)!r} holds them."
        )


_MASKS = frozenset({"mask", "masks", "label", "labels", "annotation", "annotations", "groundtruth", "gt"})


def refuse_masks(reader: LayoutReader, classes: Iterable[str]) -> None:
    """Refuse ``images`` beside ``masks`` as classes: they are parts of data for another task.

    Raises:
        DataError: all names are such.
    """
    kinds = {"mask" if name.casefold() in _MASKS else "image" if is_filler(name) else "" for name in classes}
    if kinds == {"mask", "image"}:
        raise reader.error(
            f"has the folders {some(classes)}, which are images and their masks or annotations, not classes",
            "Put the images of each class into a folder with the name of the class, without the masks.",
        )


def read_nested(reader: LayoutReader) -> None:
    """Look at the folders inside the classes of a flat layout: each class may hold its own splits.

    ``ant/train``, ``ant/val``, ``bee/train`` and so on are read as splits.

    Raises:
        DataError: some classes hold splits and others do not, or all top folders hold the same folders, so
            that these may be the classes.
    """
    inner = {name: Counter(map(_second, paths)) for name, paths in reader.splits["train"].items()}
    splits = {name: _split_of_each(folders) for name, folders in inner.items()}
    if len(inner) > 1 and all(splits.values()):
        _take_nested(reader, splits)
    elif len(inner) > 1 and any(_has_train_and_more(folders) for folders in inner.values()):
        some_of = some(name for name, folders in inner.items() if _has_train_and_more(folders))
        found = f"the class folders {some_of} hold splits, and others do not, or hold more"
        raise reader.error(found, "Put train, val and test at the top, and the classes into each of them.")
    elif len(inner) > 1 and _hold_the_same(list(inner.values())):
        shared = sorted(set.intersection(*(set(folders) for folders in inner.values())))
        found = (
            f"the folders {some(inner)} all hold {some(shared)}; it is not clear whether "
            "the outer or the inner folders are the classes"
        )
        raise reader.error(found, _FIX)


def _second(path: str) -> str:
    """Return the folder below the class folder; ``""`` for an image directly in it."""
    parts = path.split("/", 2)
    return parts[1] if len(parts) > 2 else ""


def _split_of_each(folders: Iterable[str]) -> dict[str, Split]:
    """Return the split of each folder of a class; empty if they are not the splits of a class."""
    words = {name: parse(name) for name in folders}
    rests = {word.rest for word in words.values() if word}
    # cat/train_cat beside cat/test_cat: the same further word in both.
    is_shared = len(rests) == 1 and len(words) > 1
    found = {name: word.split for name, word in words.items() if word and (word.is_certain or is_shared)}
    is_whole = len(found) == len(words) and len(set(found.values())) == len(found)
    return found if is_whole and "train" in found.values() else {}


def _has_train_and_more(folders: Iterable[str]) -> bool:
    words = [word for word in parse_all(folders) if word.is_certain]
    return len({word.split for word in words}) > 1 and any(word.split == "train" for word in words)


def _hold_the_same(inner: Sequence[Mapping[str, int]]) -> bool:
    """Return whether all folders hold mostly the same folders, two or more, and no images beside them."""
    shared = set.intersection(*(set(folders) for folders in inner))
    every = set().union(*inner)
    return "" not in every and len(shared) > 1 and 2 * len(shared) > len(every)


def _take_nested(reader: LayoutReader, splits: Mapping[str, Mapping[str, Split]]) -> None:
    """Move the images of each class into the splits that its folders name."""
    flat, reader.splits = reader.splits["train"], {}
    for name, paths in flat.items():
        for path in paths:
            by_class = reader.splits.setdefault(splits[name][_second(path)], {})
            by_class.setdefault(name, []).append(path)
    reader.splits = {split: reader.splits[split] for split in SPLITS if split in reader.splits}
    used = dict.fromkeys(f"{name}/{folder}" for name, folders in splits.items() for folder in folders)
    reader.warn(
        "split-names",
        f"Folders inside the class folders were read as splits: {some(used)}.",
        "Rename them if that is wrong.",
        len(used),
    )
