"""Read a CSV file ``path,label[,split]``; all faulty rows are reported at once, with their line numbers."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from finetune.data.dataset import SPLITS, Split
from finetune.data.layout import SHOWN, LayoutReader, quoted, some
from finetune.data.tables.columns import choose_columns
from finetune.data.tables.files import FETCH, TableFiles, is_address
from finetune.data.tables.format import find_format, read_cells, tell_format
from finetune.data.tables.labels import read_labels
from finetune.data.tables.names import keep_fitting
from finetune.data.tables.splits import KEY as SPLIT_KEY
from finetune.data.tables.splits import read_folder_splits, read_splits, split_fault
from finetune.errors import DataError, count, suggest

if TYPE_CHECKING:
    from pandas import DataFrame, Series


@dataclass
class _TableRow:
    """One row of the CSV file, cleaned; ``position`` is its position in the table, from 0."""

    position: int
    path: str
    label: str
    split: str
    group: str
    split_cell: str
    label_fault: str | None


def read_csv(reader: LayoutReader, file: Path, group_by: str | None = None) -> None:
    """Read ``path,label[,split]``; report the first few faulty rows together, with line numbers.

    Args:
        reader: stores the images, and reports faults.
        file: the CSV file.
        group_by: name of the column that holds group names; a regular expression is ignored here.

    Raises:
        DataError: the file is not a table, a row cannot be used, or there are no training rows.
    """
    found = find_format(reader, file)
    table = read_cells(reader, file, found)
    if reader.for_evaluation:
        reader.table = keep_fitting(reader.table, _header(table), file.parent)
    files = TableFiles(reader, file.parent.absolute())
    faults: list[tuple[int, str]] = []
    first: dict[str, _TableRow] = {}
    closed: dict[str, bool] = {}
    for row in _rows(reader, table, files, group_by):
        path, fault = files.find(row.path)
        fault = _row_fault(row) or fault or _path_fault(row, path, first)
        if fault is None and path is not None and not _lies_outside(reader, path, closed):
            fault = _file_fault(reader, path, row)
        if fault:
            faults.append((row.position, fault))
        elif path is not None:
            first[path] = row
            by_label = reader.splits.setdefault(cast(Split, row.split), {})
            by_label.setdefault(row.label, []).append(path)
            if row.group and reader.group_column is not None:
                reader.group_column[path] = row.group
    tell_format(reader, found, (cell for row in first.values() for cell in (row.label, row.path)))
    for said in files.renamed.values():
        reader.warn(
            "table-paths", f"In the table, {said}.", reader.decide("data.image_root", "Name the folder")
        )
    if faults:
        shown = [f"line {_line(table, position)}: {fault}" for position, fault in faults[:SHOWN]]
        more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
        reader.reject(
            "row-unusable",
            f"{count(len(faults), 'row', 'rows')} cannot be used:"
            + "".join(f"\n  {s}" for s in shown + more),
            _fix_rows(reader, [fault for _, fault in faults]),
            len(faults),
        )
    reader.check_links()
    if "train" not in reader.splits and not (reader.for_evaluation and reader.splits):
        fix = "Add rows (with split=train, if there is a split column)."
        reader.reject("no-train", "has no training rows", fix)


def _fix_rows(reader: LayoutReader, faults: Sequence[str]) -> str:
    """Return what to do about faulty rows; where a key of the recipe would decide, it is named."""
    if any(fault.endswith("is an address") for fault in faults):
        return FETCH
    keys = {
        " fits ": ("data.image_root", "Or name the folder"),
        "split ": (SPLIT_KEY, "Or name another column"),
    }
    hints = [reader.decide(*how) for text, how in keys.items() if any(text in fault for fault in faults)]
    if any("lies outside" in fault for fault in faults):
        hints += ["Or put the CSV file into a folder above the images."]
    if not hints and any("does not exist" in fault for fault in faults):
        hints = [reader.decide("data.image_root", "Or name the folder of the images"),
                 reader.decide("data.suffix", "or the ending of their names")]  # fmt: skip
    return " ".join(["Correct these lines.", *dict.fromkeys(hints)])


def _header(table: DataFrame) -> list[str]:
    return [str(cell).strip() for cell in table.iloc[0]] if len(table) else []


def _rows(
    reader: LayoutReader, table: DataFrame, files: TableFiles, group_by: str | None
) -> Iterator[_TableRow]:
    """Yield the rows below the header, cleaned; without a split column all are training rows."""
    header = _header(table)
    if any(map(files.find_existing, header)) and "path" not in header:
        raise _refuse_no_header(reader, header, files)
    if addresses := [cell for cell in header if is_address(cell)]:
        found = f"begins with no header, but with the address {quoted(addresses[0])}"
        raise reader.error(found, f"{FETCH} Write path,label[,split] above the first line.")
    body = table.iloc[1:]
    columns = choose_columns(reader, header, body, files.find_existing, group_by)
    taken = [columns.path, *columns.labels, *([columns.group] if columns.group is not None else [])]
    read = read_splits(reader, header, body, taken)
    groups = _groups(header, body, group_by)
    if group_by in header:
        reader.group_column = {}
    paths = [str(path) for path in body[columns.path]]
    files.leave_out_leading(paths)
    none = [""] * len(body)
    splits, cells = read or (read_folder_splits(reader, [*map(files.find_existing, paths)]) or none, none)
    labels = read_labels(reader, header, body, columns.labels)
    rows = zip(body.index, paths, labels, splits, cells, groups, strict=True)
    for position, path, (label, fault), split, cell, group in rows:
        yield _TableRow(int(position), path, label, split or "train", group, cell, fault)


def _groups(header: Sequence[str], body: DataFrame, group_by: str | None) -> Sequence[str] | Series[str]:
    """Return the group of each row, ``""`` for none; a regular expression applies to paths, not to cells."""
    if group_by in header:
        cells = body[header.index(group_by)].str.strip()
        if not cells.any():
            found = "the column is empty"
            raise DataError(f"--group-by {group_by}", found, "Fill it in, or name another column.")
        return cells
    if group_by is not None and re.escape(group_by) == group_by:
        found = f"there is no column {group_by!r} (columns: {some(header)}){suggest(group_by, header)}"
        fix = "Name a column, or give a regular expression for the path."
        raise DataError(f"--group-by {group_by}", found, fix)
    return [""] * len(body)


def _refuse_no_header(reader: LayoutReader, header: Sequence[str], files: TableFiles) -> DataError:
    name = next(cell for cell in header if files.find_existing(cell))
    return reader.error(
        f"has no column 'path' and no column 'label': the first line is no header, "
        f"but names the image {name!r}",
        "Write path,label[,split] above the first line.",
    )


def _row_fault(row: _TableRow) -> str | None:
    """Return what is wrong with the text of a row, or None."""
    if not row.path:
        return "the path is empty"
    if "\0" in row.path:
        return f"{quoted(row.path)} does not exist or is not a file"
    if row.label_fault:
        return row.label_fault
    return split_fault(row.split_cell) if row.split not in SPLITS else None


def _path_fault(row: _TableRow, path: str | None, first: dict[str, _TableRow]) -> str | None:
    """Return what is wrong with the path of a row, or None."""
    if path is None:
        return f"{quoted(row.path)} lies outside the folder of the CSV file"
    return _repeated(row, first[path]) if path in first else None


def _lies_outside(reader: LayoutReader, path: str, closed: dict[str, bool]) -> bool:
    """Return whether a folder above the image is a link out of the root, and record that link.

    Args:
        reader: records the link.
        path: path of the image below the root.
        closed: earlier answers by folder, updated here: resolving the folder for every row would be slow.
    """
    folder = path.rpartition("/")[0]
    if folder not in closed:
        closed[folder] = bool(folder) and reader.outside(folder) is not None
        if closed[folder]:
            any(map(reader.leads_out, _folders_to(folder)))  # records the first one: the link itself
    return closed[folder]


def _folders_to(folder: str) -> Iterator[str]:
    """Yield the folders on the way to this one, from the top, and then itself."""
    yield from (folder[:end] for end, char in enumerate(folder) if char == "/")
    yield folder


def _file_fault(reader: LayoutReader, path: str, row: _TableRow) -> str | None:
    """Return what is wrong with the file that a row names, or None; record a link out of the root."""
    full = reader.root / path
    try:
        mode = os.lstat(full).st_mode
        if stat.S_ISLNK(mode):
            if reader.leads_out(path):
                return None
            mode = os.stat(full).st_mode  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        mode = 0
    except OSError as error:
        return f"{quoted(row.path)} cannot be read ({error.strerror})"
    return None if stat.S_ISREG(mode) else f"{quoted(row.path)} does not exist or is not a file"


def _repeated(row: _TableRow, before: _TableRow) -> str:
    """Return how a path was listed before: under another label, in another split, or twice."""
    if row.label != before.label:
        return f"{quoted(row.path)} is under two labels, {quoted(before.label)} and {quoted(row.label)}"
    if row.split != before.split:
        return f"{quoted(row.path)} is in {before.split} and again in {row.split}"
    return f"{quoted(row.path)} is listed twice"


def _line(table: DataFrame, position: int) -> int:
    """Return the line of the file where a row starts, from 1; quoted cells may hold line breaks."""
    above = table[table.index < position]
    return 1 + position + sum(int(above[column].str.count("\n").sum()) for column in above.columns)
