"""Find the split of each row of a table, by columns of words (train, val, test) or of yes and no."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from finetune.data.dataset import SPLITS, Split
from finetune.data.layout import SPLIT_NAMES, LayoutReader, quoted, some
from finetune.data.layouts.split_folders import UNSURE, choose, describe, is_unsure, parse
from finetune.data.tables.config import NO_COLUMN
from finetune.data.tables.names import find_named, plain
from finetune.errors import count, suggest

if TYPE_CHECKING:
    from pandas import DataFrame

_NAME = re.compile(
    "sets?|tvt|.*(split|partition|subset|mluse|train(or)?(and)?(val|test)|holdout).*|(k|cv|x)?folds?(id|no|num|number|idx|index|[0-9]+)?|"
    "(cv|crossval|crossvalidation)(group|set)?|(train|val|valid|validation|test)folds?"
)
"""Names of columns that hold splits, in lower case and without separators."""
_OF: Mapping[str, Split] = {"train": "train", "training": "train", "val": "val", "valid": "val",
                            "validation": "val", "test": "test", "testing": "test"}  # fmt: skip
FLAGS: Mapping[str, Split] = {
    **{f"is{word}": split for word, split in _OF.items()},
    **{f"is{word}set": split for word, split in _OF.items()},
    **{f"in{word}": split for word, split in _OF.items()},
    **{f"is{word}image": split for word, split in _OF.items()},
}
"""Names of columns that say yes or no, and the split that yes stands for."""
_FLAG_WORDS = frozenset(
    {"is", "in", "for", "as", "use", "used", "flag", "indicator", "row", "set", "image", "sample", "fold"}
)
"""Words beside the one for a split in the name of such a column: ``use_for_train``, ``test_flag``."""
_SHORT: Mapping[str, Split] = {"tr": "train", "va": "val", "vl": "val", "te": "test", "ts": "test"}
"""Cells that name a split only where all cells do."""
_YES = frozenset({"true", "1", "1.0", "yes", "t", "y"})
_NO = frozenset({"false", "0", "0.0", "no", "f", "n"})
DRAWN = frozenset({"", "unassigned", "none", "null", "nan", "na", "n/a"})
"""Cells of rows without a split."""
KEY = "data.split_column"
UNKNOWN = "?"
"""Marks a cell that names no split."""


def read_splits(
    reader: LayoutReader, header: Sequence[str], body: DataFrame, taken: Collection[int]
) -> tuple[list[str], list[str]] | None:
    """Return the split of each row ("" where it is to be drawn), and its cell as the table has it.

    None if no column gives splits.

    Args:
        reader: gives the configuration, and is told what was taken.
        header: names of the columns.
        body: the rows.
        taken: columns that hold paths, labels and groups.

    Raises:
        DataError: the columns can be read in two ways, or a column that is named like a split holds none.
    """
    words, flags = _find_columns(reader, header, body, taken)
    telling = [number for number in words if any(_meaning(cell) in SPLITS for cell in _cells(body, number))]
    if telling or flags:  # a column "fold" of numbers beside them is something else
        words = telling
    readings = {number: _read_words(reader, header[number], _cells(body, number)) for number in words}
    if flags:
        readings[flags[0]] = _read_flags(reader, header, body, flags)
    if not readings:
        return None
    first, *others = readings
    for other in others:
        if readings[other] != readings[first]:
            raise reader.error(
                f"names splits in two columns, {header[first]!r} and {header[other]!r}, that differ",
                reader.decide(KEY, "Name the right one"),
            )
    _tell(reader, header, body, [first] if first not in flags else flags, readings[first])
    return readings[first], _cells(body, first)


def read_folder_splits(reader: LayoutReader, paths: Sequence[str | None]) -> list[str] | None:
    """Return the split of each row by the folder of its image, for a table without a column of splits.

    None where the folders are not named like splits, or the recipe says that there is none.

    Raises:
        DataError: some of the folders are named like splits, for training and others, and some are not.
    """
    if reader.table.split_column is not None:
        return None
    folders = [(path or "").split("/")[:-1] for path in paths]
    for depth in range(3):
        own = [parts[depth] if len(parts) > depth else "" for parts in folders]
        names = set(own) - {""}
        chosen = choose(sorted(names))
        if "train" not in chosen or len(chosen) == 1:
            continue
        splits = {split: some_of[0] for split, some_of in chosen.items()}
        of = {name: split for split, name in splits.items()}
        held = [name for name in of if is_unsure(name) and not {"val", "test"} <= splits.keys()]
        others = sorted(names - of.keys()) or held
        if others or "" in {name for name, path in zip(own, paths, strict=True) if path}:
            raise reader.error(
                f"has no column of splits, and names images in folders like splits ({some(of)}) and in others"
                f"{f' ({some(others)})' if others else ''}",
                f"Write a column split with train, val and test. {reader.decide(KEY, 'Or name it, or none')}",
            )
        reader.warn(
            "table-split",
            f"The folders of the images gave the splits: {describe(splits)}.",
            reader.decide(KEY, "Name a column, or none"),
        )
        return [of.get(name, "train") for name in own]
    return None


def _cells(body: DataFrame, number: int) -> list[str]:
    return [str(cell) for cell in body[number].str.strip()]


def _find_columns(
    reader: LayoutReader, header: Sequence[str], body: DataFrame, taken: Collection[int]
) -> tuple[list[int], list[int]]:
    """Return the columns that hold words for splits, and those that hold yes and no."""
    wanted = reader.table.split_column
    if wanted == NO_COLUMN and NO_COLUMN not in header:
        return [], []
    if wanted is not None or "split" in header:
        number = find_named(reader, header, wanted, "split_column") if wanted else header.index("split")
        is_flag = _flag_split(header[number]) is not None
        return ([], [number]) if is_flag and _is_yes_no(_cells(body, number)) else ([number], [])
    free = [number for number in range(len(header)) if number not in taken]
    flags = [number for number in free if _is_flag(header[number], _cells(body, number))]
    if len(flags) == 1 and _may_mean_usable(header[flags[0]]):
        raise reader.error(
            f"has a column {header[flags[0]]!r} of yes and no, which may mean the validation split, or "
            "images that can be used",
            reader.decide(KEY, "Name it, or none"),
        )
    return [n for n in free if n not in flags and is_split_column(reader, header, body, n)], flags


def is_split_column(reader: LayoutReader, header: Sequence[str], body: DataFrame, number: int) -> bool:
    """Return whether a column is named like a split, or holds nothing but words for splits.

    Raises:
        DataError: some of its cells name different splits, and others name none.
    """
    name, cells = header[number], _cells(body, number)
    wanted = reader.table.split_column
    if wanted is not None or "split" in header:
        return name == (wanted or "split")
    is_named = _NAME.fullmatch(plain(name)) is not None or plain(name) in FLAGS
    is_named = is_named or (is_unsure(re.sub(r"^(is|in|for)[\W_]*", "", name)) and _is_yes_no(cells))
    return is_named or _is_flag(name, cells) or _holds_splits(reader, name, cells)


def _is_flag(name: str, cells: Sequence[str]) -> bool:
    """Return whether a column says yes or no to a split."""
    return _flag_split(name) is not None and _is_yes_no(cells)


def _flag_split(name: str) -> Split | None:
    """Return the split that yes stands for in a column of this name, or None."""
    if split := FLAGS.get(plain(name)) or _OF.get(plain(name)):
        return split
    found = parse(name)
    is_flag = found is not None and found.word not in UNSURE and _FLAG_WORDS.issuperset(found.rest)
    return found.split if found and is_flag else None


def _may_mean_usable(name: str) -> bool:
    found = parse(name)
    return found is not None and found.word == "valid" and plain(name) not in FLAGS


def _is_yes_no(cells: Sequence[str]) -> bool:
    filled = {cell.lower() for cell in cells} - DRAWN
    return bool(filled) and filled <= _YES | _NO


def _holds_splits(reader: LayoutReader, name: str, cells: Sequence[str]) -> bool:
    """Return whether the cells of a column with any name are all words for splits.

    Raises:
        DataError: some cells name different splits, and others name none.
    """
    filled = {cell for cell in cells if cell.lower() not in DRAWN}
    sure = {cell for cell in filled if (found := parse(cell)) and found.is_certain}
    if sure and all(cell in sure or is_unsure(cell) for cell in filled):
        return True
    lower = {cell.lower() for cell in filled}
    if "tr" in lower and len(lower) > 1 and lower <= _SHORT.keys():
        return True
    hinted = {found.split for cell in filled if (found := parse(cell))}
    if len(filled) <= 20 and sure and len(hinted) > 1:
        raise reader.error(
            f"has a column {name!r} that names splits ({some(sorted(sure))}) and also holds "
            f"{some(sorted(filled - sure))}",
            reader.decide(KEY, "Name the column of the splits, or none"),
        )
    return False


def _read_words(reader: LayoutReader, name: str, cells: Sequence[str]) -> list[str]:
    """Return the split of each cell; UNKNOWN for one that names none."""
    meanings = {cell: _meaning(cell) for cell in set(cells)}
    known = {meaning for meaning in meanings.values() if meaning != UNKNOWN}
    odd = sorted(cell for cell, meaning in meanings.items() if meaning == UNKNOWN)
    if odd and known <= {""}:
        raise reader.error(
            f"has a column {name!r} whose cells name no split ({some(odd)})",
            f"Write train, val and test into it. {reader.decide(KEY, 'Name another column, or none')}",
        )
    held = sorted(cell for cell in meanings if is_unsure(cell) and meanings[cell] != UNKNOWN)
    sure = {meaning for cell, meaning in meanings.items() if cell not in held}
    if (held and "test" not in sure) or (held and "val" in sure):
        raise reader.error(
            f"has {some(held)} in column {name!r}, which may mean validation or test",
            "Write val or test instead.",
        )
    read: list[str] = [meanings[cell] for cell in cells]
    return read


def _meaning(cell: str) -> str:
    if cell.lower() in DRAWN:
        return ""
    if split := SPLIT_NAMES.get(cell.lower()) or _SHORT.get(cell.lower()):
        return split
    found = parse(cell)
    return found.split if found and found.is_certain else UNKNOWN


def _read_flags(
    reader: LayoutReader, header: Sequence[str], body: DataFrame, columns: Sequence[int]
) -> list[str]:
    """Return the split of each row by columns of yes and no.

    No column says yes: the row is of the training split, unless a column says that it is not.
    """
    of = [_flag_split(header[number]) for number in columns]
    read: list[str] = []
    for cells in zip(*(_cells(body, number) for number in columns), strict=True):
        yes = {split for split, cell in zip(of, cells, strict=True) if split and cell.lower() in _YES}
        no = {split for split, cell in zip(of, cells, strict=True) if cell.lower() in _NO}
        left = [split for split in SPLITS if split not in no]
        if len(yes) > 1 or (not yes and "train" in no and len(left) != 1):
            said = ", ".join(f"{header[n]}={quoted(cell)}" for n, cell in zip(columns, cells, strict=True))
            raise reader.error(
                f"has a row with {said}, which may mean more than one split",
                "Write a column split with train, val and test. " + reader.decide(KEY, "Name it, or none"),
            )
        read.append(next(iter(yes)) if yes else ("" if not no else left[0]))
    return read


def _tell(
    reader: LayoutReader,
    header: Sequence[str],
    body: DataFrame,
    columns: Sequence[int],
    splits: Sequence[str],
) -> None:
    """Say which column was taken, unless it is ``split``, and how many rows have no split."""
    names = [header[number] for number in columns]
    cells = {cell.lower() for number in columns for cell in _cells(body, number)}
    if names != ["split"] or not cells <= SPLIT_NAMES.keys() | DRAWN:
        numbers = ", ".join(f"{splits.count(name)} {name}" for name in SPLITS if name in splits)
        column = "Column" if len(names) == 1 else "Columns"
        reader.warn(
            "table-split",
            f"{column} {some(names)} gave the splits: {numbers or 'none'}.",
            reader.decide(KEY, "Name another column, or none"),
        )
    if drawn := splits.count(""):
        given = "for training" if "val" in splits else "drawn for training and validation"
        reader.warn(
            "table-unassigned",
            f"{count(drawn, 'row')} without a split in {some(names)}: {given}.",
            "Fill in the column if they should have one.",
            drawn,
        )


def split_fault(cell: str) -> str:
    """Return what is wrong with a cell that names no split."""
    return f"split {quoted(cell)} is not one of train, val, test{suggest(cell.lower(), SPLIT_NAMES)}"
