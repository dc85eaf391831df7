"""Choose the columns of paths and labels, by their names and by what their cells hold.

``path`` and ``label`` are taken first. Then come names that mean the same in published tables; several of
them are told apart by which names existing files, or are one labelling in two forms. A column that cannot be
told from another is never guessed: the table is refused, and the recipe's key named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

from finetune.data.layout import LayoutReader, some
from finetune.data.tables.names import find_named, plain
from finetune.data.tables.splits import is_split_column
from finetune.errors import DataError, suggest

if TYPE_CHECKING:
    from pandas import DataFrame

_IMAGE = ("image", "images", "img", "imgs", "photo", "picture", "pic", "file", "sample")
_ASPECTS = ("", "path", "paths", "name", "names", "id", "ids", "file", "files", "filename", "filepath",
            "index",             "location", "uri", "url", "link")  # fmt: skip
PATHS = frozenset(
    {f"{image}{aspect}" for image in _IMAGE for aspect in _ASPECTS}
    | {
        "path", "paths", "fullpath",
        "relativepath", "relpath", "localpath", "fname", "fnames", "id", "ids",
        "idcode", "uuid", "guid", "uri", "url", "gcsuri", "imagegcsuri", "gcspath", "isicid", "photoid",
        "src", "key",
    }
)  # fmt: skip
"""Names of columns that hold paths, in lower case and without separators."""
LABELS = frozenset(
    {
        "label", "labels", "class", "classes", "category", "categories", "target", "targets", "y",
        "labelname", "labelnames", "classname", "classnames", "categoryname", "targetname", "labelid",
        "labelids", "classid", "classids", "categoryid", "targetid", "labelindex", "classindex", "labelidx",
        "classidx", "classlabel", "labeltext", "classnumber", "tag", "tags", "groundtruth", "truelabel",
        "dx", "diagnosis", "species", "breed", "finding", "findinglabels",
    }
)  # fmt: skip
"""Names of columns that hold labels, in lower case and without separators."""
_TRIED = 50
VALUE = "value"
"""Name of a column of numbers to predict."""
FLAGS = frozenset({"0", "1", "0.0", "1.0"})
"""Cells of a column that says of one class whether an image has it."""


class Columns(NamedTuple):
    """Numbers of the columns, from 0; several columns of labels are of 0 and 1, one for each class."""

    path: int
    labels: tuple[int, ...]
    group: int | None


def choose_columns(
    reader: LayoutReader,
    header: Sequence[str],
    body: DataFrame,
    find: Callable[[str], str | None],
    group_by: str | None,
) -> Columns:
    """Return the columns of paths, labels and groups.

    Args:
        reader: gives the configuration, and is told what was taken.
        header: names of the columns.
        body: the rows.
        find: returns the existing file that a cell names, or None.
        group_by: name of the column that holds group names.

    Raises:
        DataError: a column is missing, twice, or cannot be told from another.
    """
    _refuse_twice(reader, header)
    group = header.index(group_by) if group_by in header else None
    path = _find_path(reader, header, body, find)
    labels = _find_labels(reader, header, body, path, group)
    if path is None or not labels:
        raise _missing(reader, header, path, labels)
    names = [header[number] for number in labels]
    if (header[path], names) not in [("path", [name]) for name in ("label", "labels", VALUE)]:
        what = f"{names[0]!r} as the label" if len(names) == 1 else f"{some(names)} as one class each"
        reader.warn(
            "table-columns",
            f"Column {header[path]!r} was read as the path, and {what}.",
            reader.decide("data.path_column or data.label_column", "Name another"),
        )
    return Columns(path, labels, group)


def find_path_column(reader: LayoutReader, header: Sequence[str]) -> int:
    """Return the column of paths by its name alone, for a table without labels.

    Raises:
        DataError: there is none, or several.
    """
    wanted = [number for number, name in enumerate(header) if name == "path"] or _named(header, PATHS)
    if len(wanted) == 1 or len(header) == 1:
        return wanted[0] if wanted else 0
    if wanted:
        shown = [header[number] for number in wanted]
        found = (
            "has more than one column 'path'" if shown[0] == "path" else f"may name images in {some(shown)}"
        )
    else:
        found = f"has no column 'path' (columns: {some(header) or 'none'}{suggest('path', header)})"
    raise reader.error(found, "Name the column of the images' paths `path` in the first line.")


def _refuse_twice(reader: LayoutReader, header: Sequence[str]) -> None:
    twice = [name for name in ("path", "label", "split") if header.count(name) > 1]
    if twice:
        raise reader.error(f"has more than one column {twice[0]!r}", "Keep one of them.")


def _named(header: Sequence[str], names: Collection[str]) -> list[int]:
    return [number for number, name in enumerate(header) if plain(name) in names]


def _find_path(
    reader: LayoutReader, header: Sequence[str], body: DataFrame, find: Callable[[str], str | None]
) -> int | None:
    if reader.table.path_column is not None:
        return find_named(reader, header, reader.table.path_column, "path_column")
    if "path" in header:
        return header.index("path")
    known = _named(header, PATHS)
    label = reader.table.label_column
    others = [
        number
        for number, name in enumerate(header)
        if plain(name) not in PATHS | LABELS | {""} and name != label and not name.startswith("Unnamed:")
    ]

    def hits(number: int) -> bool:
        cells = body[number].str.strip()
        return any(map(find, cells[cells != ""].head(_TRIED)))

    fitting = known if len(known) == 1 and len(others) == 0 else [number for number in known if hits(number)]
    fitting = fitting or [number for number in others if hits(number)] or known
    named = [[find(cell) for cell in body[number].str.strip()] for number in fitting if len(fitting) > 1]
    if any(files != named[0] for files in named):
        raise reader.error(
            f"has {len(fitting)} columns that may hold the paths: {some(header[n] for n in fitting)}",
            reader.decide("data.path_column", "Name the right one"),
        )
    return fitting[0] if fitting else None


def _find_labels(
    reader: LayoutReader, header: Sequence[str], body: DataFrame, path: int | None, group: int | None
) -> tuple[int, ...]:
    """Return the column of labels, or one of 0 and 1 for each class; empty if there is none."""
    if reader.table.label_column is not None:
        return (find_named(reader, header, reader.table.label_column, "label_column"),)
    for name in (VALUE, "label") if reader.table.target == "number" else ("label",):
        if name in header:
            return (header.index(name),)
    known = [number for number in _named(header, LABELS) if number not in {path, group}]
    if not known and VALUE in header:
        return (header.index(VALUE),)
    if not known:
        known = _remaining(reader, header, body, path, group)
    if len(known) < 2:
        return tuple(known)
    if _are_flags(body, known):
        return tuple(known)
    if not _are_one(body, known):
        raise reader.error(
            f"has {len(known)} columns that may hold the labels: {some(header[n] for n in known)}",
            reader.decide("data.label_column", "Name the right one"),
        )
    return (min(known, key=lambda number: _is_code(header[number], body[number].str.strip().tolist())),)


def _is_code(name: str, cells: Sequence[str]) -> tuple[bool, bool]:
    """Return what speaks for numbers or codes: of two forms of one labelling, the names are taken."""
    is_numeric = all(re.fullmatch(r"[-\d.]*", cell) for cell in cells)
    return is_numeric, plain(name).endswith(("id", "ids", "idx", "index", "number", "code"))


def _remaining(
    reader: LayoutReader, header: Sequence[str], body: DataFrame, path: int | None, group: int | None
) -> list[int]:
    """Return the columns that are neither paths, splits nor groups, nor the numbers of rows."""
    others = [
        number
        for number, name in enumerate(header)
        if number not in {path, group}
        and plain(name)
        and not name.startswith("Unnamed:")
        and not is_split_column(reader, header, body, number)
    ]
    if [plain(header[number]) in PATHS for number in others] == [True]:  # such as Image,Id
        return [number for number in others if body[number].nunique() < len(body)]
    return [number for number in others if plain(header[number]) not in PATHS]


def _are_one(body: DataFrame, columns: Sequence[int]) -> bool:
    """Return whether columns divide the rows in the same way, so that each can be computed from another."""
    rows = body[list(columns)].drop_duplicates()
    return len(rows) == max(rows[number].nunique() for number in columns) == min(
        rows[number].nunique() for number in columns
    )  # fmt: skip


def _are_flags(body: DataFrame, known: Sequence[int]) -> bool:
    """Return whether each of several columns holds nothing but 0 and 1."""
    return len(body) > 0 and all(set(body[number].str.strip()) <= FLAGS for number in known)


def _missing(
    reader: LayoutReader, header: Sequence[str], path: int | None, labels: Sequence[int]
) -> DataError:
    missing = ["path"] if path is None else []
    missing += [] if labels else ["label"]
    near = "".join(f"; for {name!r}{suggest(name, header)[1:]}" for name in missing if suggest(name, header))
    keys = ", ".join(f"data.{name}_column" for name in missing)
    return reader.error(
        f"has no column {' and no column '.join(map(repr, missing))} (columns: {some(header)}{near})",
        f"Write path,label[,split] into the first line. {reader.decide(keys, 'Or name the columns')}",
    )
