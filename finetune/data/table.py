"""Read a CSV file ``path,label[,split]``; all faulty rows are reported at once, with their line numbers."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.data.layout import SHOWN, SPLIT_NAMES, LayoutReader, count, name_fault, quoted, some
from finetune.errors import DataError, suggest

MAX_BYTES = 2**30
"""Largest file: the whole table is held in memory, at several times its size on disk. A million rows take
100 MB or less on disk."""

if TYPE_CHECKING:
    from pandas import DataFrame, Series


@dataclass
class _TableRow:
    """One row of the CSV file, cleaned; ``position`` is its position in the table, from 0."""

    position: int
    path: str
    label: str
    split: str
    group: str = ""


def read_csv(reader: LayoutReader, file: Path, group_by: str | None = None) -> None:
    """Read ``path,label[,split]``; report the first few faulty rows together, with line numbers.

    Args:
        reader: stores the images, and reports faults.
        file: the CSV file.
        group_by: name of the column that holds group names; a regular expression is ignored here.

    Raises:
        DataError: the file is not a table, a row cannot be used, or there are no training rows.
    """
    table = _table(reader, file)
    faults: list[tuple[int, str]] = []
    first: dict[str, _TableRow] = {}
    closed: dict[str, bool] = {}
    for row in _rows(reader, table, group_by):
        path = _below_root(reader.root, row.path)
        fault = _row_fault(row, path, first)
        if fault is None and path is not None and not _lies_outside(reader, path, closed):
            fault = _file_fault(reader, path, row)
        if fault:
            faults.append((row.position, fault))
        elif path is not None:
            first[path] = row
            by_label = reader.splits.setdefault(SPLIT_NAMES[row.split], {})
            by_label.setdefault(row.label, []).append(path)
            if row.group and reader.group_column is not None:
                reader.group_column[path] = row.group
    if faults:
        shown = [f"line {_line(table, position)}: {fault}" for position, fault in faults[:SHOWN]]
        more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
        reader.reject(
            "row-unusable",
            f"{count(len(faults), 'row', 'rows')} cannot be used:"
            + "".join(f"\n  {s}" for s in shown + more),
            "Correct these lines.",
            len(faults),
        )
    reader.check_links()
    if "train" not in reader.splits and not (reader.for_evaluation and reader.splits):
        fix = "Add rows (with split=train, if there is a split column)."
        reader.reject("no-train", "has no training rows", fix)


def _table(reader: LayoutReader, file: Path) -> DataFrame:
    """Return all cells as text, header included, without blank lines; the index is the original position."""
    from pandas import read_csv
    from pandas.errors import EmptyDataError, ParserError

    _refuse_huge(reader, file)
    try:
        # With header=None pandas requires every row to be as wide as the first: a stray comma is an error
        # instead of a silent shift of all columns by one.
        table = read_csv(
            file, header=None, dtype=str, keep_default_na=False, na_filter=False, encoding="utf-8-sig",
            skip_blank_lines=False, skipinitialspace=True,
        )  # fmt: skip
    except EmptyDataError:
        raise reader.error("has an empty first line", "Start it with the header path,label.") from None
    except UnicodeDecodeError as error:
        raise reader.error(
            f"is not UTF-8 ({error.reason} at byte {error.start})", "Save it as UTF-8."
        ) from error
    except ParserError as error:
        message = " ".join(str(error).split()).removeprefix("Error tokenizing data. C error: ")
        raise reader.error(f"is not a table ({message})", "Quote cells that hold commas.") from error
    except OSError as error:
        raise reader.error(f"cannot be read ({error.strerror})", "Make the file readable.") from error
    return table[(table != "").any(axis=1)]


def _refuse_huge(reader: LayoutReader, file: Path) -> None:
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise reader.error(
            f"has {-(-size // 2**20)} MB, more than {MAX_BYTES // 2**20} MB",
            "Leave out columns other than path,label,split, or give a folder of class folders.",
        )


def _rows(reader: LayoutReader, table: DataFrame, group_by: str | None) -> Iterator[_TableRow]:
    """Yield the rows below the header, cleaned; without a split column all are training rows."""
    header = [str(cell).strip() for cell in table.iloc[0]] if len(table) else []
    _require_columns(reader, header)
    body = table.iloc[1:]
    labels = body[header.index("label")].str.strip()
    splits = (
        body[header.index("split")].str.strip().str.lower() if "split" in header else ["train"] * len(body)
    )
    groups = _groups(header, body, group_by)
    if group_by in header:
        reader.group_column = {}
    cells = zip(body.index, body[header.index("path")], labels, splits, groups, strict=True)
    for position, path, label, split, group in cells:
        yield _TableRow(int(position), path, label, split, group)


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


def _require_columns(reader: LayoutReader, header: Sequence[str]) -> None:
    missing = [name for name in ("path", "label") if name not in header]
    twice = [name for name in ("path", "label", "split") if header.count(name) > 1]
    if twice:
        raise reader.error(f"has more than one column {twice[0]!r}", "Keep one of them.")
    if missing:
        near = "".join(
            f"; for {name!r}{suggest(name, header)[1:]}" for name in missing if suggest(name, header)
        )
        commas = " with commas between the cells" if any(mark in c for c in header for mark in ";\t|") else ""
        raise reader.error(
            f"has no column {' and no column '.join(map(repr, missing))} (columns: {some(header)}{near})",
            f"Write path,label[,split] into the first line{commas}.",
        )


def _below_root(root: Path, path: str) -> str | None:
    """Return the normalised path relative to the CSV file's folder, or None if it lies outside."""
    if not path or "\0" in path:
        return None
    full = os.path.normpath(root / path)
    for resolve in (os.path.normpath, os.path.realpath):  # realpath: for absolute paths through a link
        top = resolve(root)
        if full.startswith(os.path.join(top, "")):  # noqa: PTH118
            return Path(full).relative_to(top).as_posix()
    return None


def _row_fault(row: _TableRow, path: str | None, first: dict[str, _TableRow]) -> str | None:
    """Return what is wrong with the text of a row, or None."""
    if not row.path:
        return "the path is empty"
    if "\0" in row.path:
        return f"{quoted(row.path)} does not exist or is not a file"
    if fault := name_fault(row.label):
        return f"the label {quoted(row.label)} {fault}"
    if row.split not in SPLIT_NAMES:
        return f"split {quoted(row.split)} is not one of train, val, test{suggest(row.split, SPLIT_NAMES)}"
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
    if SPLIT_NAMES[row.split] != SPLIT_NAMES[before.split]:
        return f"{quoted(row.path)} is in {before.split} and again in {row.split}"
    return f"{quoted(row.path)} is listed twice"


def _line(table: DataFrame, position: int) -> int:
    """Return the line of the file where a row starts, from 1; quoted cells may hold line breaks."""
    above = table[table.index < position]
    return 1 + position + sum(int(above[column].str.count("\n").sum()) for column in above.columns)
