"""Class names that look alike: those of another Unicode form are joined, others are warned about."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Sequence

from finetune.data.dataset import SPLITS
from finetune.data.layout import LayoutReader, some


def join_spellings(reader: LayoutReader) -> None:
    """Join classes whose names differ in their Unicode form only, as macOS and other systems write them.

    The class has the name that the training split gives it, or its composed form if that gives several.
    """
    spelled: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for split in SPLITS:
        for name in reader.splits.get(split, {}):
            spelled[unicodedata.normalize("NFC", name)][name] = None
    train = reader.splits.get("train", {})
    chosen = {}
    for form, names in spelled.items():
        own = [name for name in names if name in train] or list(names)
        chosen.update(dict.fromkeys(names, own[0] if len(own) == 1 else form))
    joined = sorted({chosen[name] for names in spelled.values() if len(names) > 1 for name in names})
    if not joined:
        return
    for split, by_class in reader.splits.items():
        merged: dict[str, list[str]] = {}
        for name, paths in by_class.items():
            merged.setdefault(chosen[name], []).extend(paths)
        reader.splits[split] = merged
    reader.warn(
        "class-joined",
        f"Class names that differ in their Unicode form only were read as one class: {some(joined)}.",
        "Give the folders of one class the same name.",
        len(joined),
    )


def warn_look_alikes(reader: LayoutReader, classes: Sequence[str]) -> None:
    """Warn about classes that differ only in letter case, spaces or invisible characters."""
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for name in classes:
        alike[fold_name(name)].append(name)
    for names in alike.values():
        if len(names) > 1:
            more = "" if len({name.casefold() for name in names}) == 1 else ", spaces or invisible characters"
            reader.warn(
                "class-alike",
                f"Classes {some(names)} differ only in letter case{more}, and are trained as different "
                "classes.",
                "Merge them if they are the same class.",
                len(names),
            )


def fold_name(name: str) -> str:
    """Return a name as a reader sees it: without letter case, invisible characters and further spaces."""
    seen = "".join(char for char in unicodedata.normalize("NFKC", name) if unicodedata.category(char) != "Cf")
    return " ".join(seen.split()).casefold()
