"""Read the labels of a table's rows: one class each, several, or a number."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from finetune.data.layout import LayoutReader, name_fault, quoted, some
from finetune.data.tables.columns import VALUE
from finetune.data.tables.names import plain
from finetune.errors import count
from finetune.targets import SEPARATOR, TargetKind

if TYPE_CHECKING:
    from pandas import DataFrame

_PLURALS = frozenset(
    {"labels", "classes", "categories", "targets", "tags", "labelnames", "classnames", "findinglabels"}
)
"""Names of columns that may hold several labels, in lower case and without separators."""
_SEPARATORS = (SEPARATOR, ";")
_YES = frozenset({"1", "1.0"})

Label = tuple[str, str | None]
"""A label as text, and what is wrong with its cell (or None)."""


def read_labels(
    reader: LayoutReader, header: Sequence[str], body: DataFrame, columns: Sequence[int]
) -> list[Label]:
    """Return the label of each row, and tell the reader what kind of labels they are.

    Args:
        reader: gives the configuration, and is told the kind.
        header: names of the columns.
        body: the rows.
        columns: the column of labels, or several of 0 and 1.

    Raises:
        DataError: the labels are not of the kind that was asked for, or their separator is not clear.
    """
    names = [header[number] for number in columns]
    cells = [[str(cell) for cell in body[number].str.strip()] for number in columns]
    if len(columns) > 1:
        return _read_flags(reader, names, cells)
    (name,), (own,) = names, cells
    separator = _find_separator(reader, name, own)
    reader.target_kind = reader.table.target or _guess(reader, name, own, separator)
    if reader.target_kind == "number":
        return [_read_number(cell) for cell in own]
    if reader.target_kind == "multi":
        return [_read_several(cell, separator) for cell in own]
    return [(cell, _fault_of(cell)) for cell in own]


def _guess(reader: LayoutReader, name: str, cells: Sequence[str], separator: str | None) -> TargetKind:
    if plain(name) in _PLURALS and (separator is not None or any(map(_is_list, cells))):
        return "multi"
    if name == VALUE and all(_read_number(cell)[1] is None for cell in cells):
        return "number"
    several = [cell for cell in cells if SEPARATOR in cell]
    if several:
        reader.warn(
            "table-several",
            f"{count(len(several), 'cell', 'cells')} of column {name!r} may name several labels "
            f"({some(several[:1])}), and each was read as one class.",
            reader.decide("data.target", "Say multi if these are several labels"),
            len(several),
        )
    return "single"


def _find_separator(reader: LayoutReader, name: str, cells: Sequence[str]) -> str | None:
    """Return what separates labels in these cells, or None if nothing does.

    Raises:
        DataError: both separators occur where several labels are expected.
    """
    if reader.table.label_separator is not None:
        return reader.table.label_separator
    found = [one for one in _SEPARATORS if any(one in cell for cell in cells)]
    is_several = reader.table.target == "multi" or (reader.table.target is None and plain(name) in _PLURALS)
    if len(found) > 1 and is_several:
        raise reader.error(
            f"has {SEPARATOR!r} and ';' in column {name!r}, and either may separate labels",
            reader.decide("data.label_separator", "Name the one that does"),
        )
    return found[0] if found else None


def _is_list(cell: str) -> bool:
    return cell.startswith("[") and cell.endswith("]")


def _read_several(cell: str, separator: str | None) -> Label:
    """Return the sorted names of a cell: ``cat|dog``, or a list as Python and JSON write it."""
    if _is_list(cell):
        try:
            names = [str(name).strip() for name in ast.literal_eval(cell)]
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return cell, f"the labels {quoted(cell)} are not a list"
    else:
        names = [name.strip() for name in (cell.split(separator) if separator else [cell])]
        names = [name for name in names if name]  # "a|b|", and an empty cell
    return _join(names)


def _join(names: Sequence[str]) -> Label:
    faults = (_fault_of(name) or _holds_separator(name) for name in names)
    return SEPARATOR.join(sorted(set(names))), next((fault for fault in faults if fault), None)


def _holds_separator(name: str) -> str | None:
    return f"the label {quoted(name)} holds {SEPARATOR!r}" if SEPARATOR in name else None


def _fault_of(name: str) -> str | None:
    fault = name_fault(name)
    return f"the label {quoted(name)} {fault}" if fault else None


def _read_number(cell: str) -> Label:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        return cell, f"the label {quoted(cell)} is not a finite number"
    return repr(value), None


# --- a column of 0 and 1 for each class ---


def _read_flags(reader: LayoutReader, names: Sequence[str], cells: Sequence[Sequence[str]]) -> list[Label]:
    """Return the names of the columns with a 1; where each row has exactly one, each image has one class."""
    rows = [*zip(*cells, strict=True)]
    is_one = all(sum(cell in _YES for cell in row) == 1 for row in rows)
    reader.target_kind = reader.table.target or ("single" if is_one else "multi")
    if reader.target_kind == "number" or (reader.target_kind == "single" and not is_one):
        wanted = "one number" if reader.target_kind == "number" else "exactly one 1 in each row"
        raise reader.error(
            f"has columns of 0 and 1 ({some(names)}), and --target {reader.target_kind} needs {wanted}",
            reader.decide("data.label_column", "Name the column of labels"),
        )
    return [_join([*_marked(names, row)]) for row in rows]


def _marked(names: Sequence[str], row: Sequence[str]) -> Iterator[str]:
    yield from (name for name, cell in zip(names, row, strict=True) if cell in _YES)
