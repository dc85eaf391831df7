"""Read a CSV file ``path,label[,split]``; all its mistakes are told at once, with their lines."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.data.finding import SHOWN, SPLIT_NAMES, Finding, count, name_fault, some
from finetune.errors import suggest

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass
class _Row:
    """One row of the CSV, cleaned: ``place`` is its position in the table, from 0."""

    place: int
    path: str
    label: str
    split: str


def read_csv(finding: Finding, file: Path) -> None:
    """Read ``path,label[,split]``; show the first few faults of all rows at once, with line numbers."""
    table = _table(finding, file)
    faults: list[tuple[int, str]] = []
    first: dict[str, _Row] = {}
    for row in _rows(finding, table):
        path = _below_root(finding.root, row.path)
        fault = _row_fault(finding.root, row, path, first)
        if fault:
            faults.append((row.place, fault))
        elif path is not None:
            first[path] = row
            part = finding.parts.setdefault(SPLIT_NAMES[row.split], {})
            part.setdefault(row.label, []).append(path)
    if faults:
        shown = [f"line {_line(table, place)}: {fault}" for place, fault in faults[:SHOWN]]
        more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
        raise finding.refuse(
            f"{count(len(faults), 'row', 'rows')} cannot be used:"
            + "".join(f"\n  {s}" for s in shown + more),
            "Correct these lines.",
        )
    if "train" not in finding.parts:
        raise finding.refuse(
            "has no training rows", "Add rows (with split=train, if there is a split column)."
        )


def _table(finding: Finding, file: Path) -> DataFrame:
    """Return the file as text cells, header included, blank lines left out; the index keeps its positions."""
    from pandas import read_csv
    from pandas.errors import EmptyDataError, ParserError

    try:
        # Without a header of its own pandas holds every row to the width of the first: a stray comma
        # is an error instead of a silent shift of all columns by one.
        table = read_csv(
            file, header=None, dtype=str, keep_default_na=False, na_filter=False, encoding="utf-8-sig",
            skip_blank_lines=False, skipinitialspace=True,
        )  # fmt: skip
    except EmptyDataError:
        raise finding.refuse("has an empty first line", "Start it with the header path,label.") from None
    except UnicodeDecodeError as error:
        raise finding.refuse(
            f"is not UTF-8 ({error.reason} at byte {error.start})", "Save it as UTF-8."
        ) from error
    except ParserError as error:
        said = " ".join(str(error).split()).removeprefix("Error tokenizing data. C error: ")
        raise finding.refuse(f"is not a table ({said})", "Quote cells that hold commas.") from error
    except OSError as error:
        raise finding.refuse(f"cannot be read ({error.strerror})", "Make the file readable.") from error
    return table[(table != "").any(axis=1)]


def _rows(finding: Finding, table: DataFrame) -> Iterator[_Row]:
    """Give the rows below the header, label and split cleaned; without a split column all are training."""
    header = [str(cell).strip() for cell in table.iloc[0]] if len(table) else []
    _require_columns(finding, header)
    body = table.iloc[1:]
    labels = body[header.index("label")].str.strip()
    splits = (
        body[header.index("split")].str.strip().str.lower() if "split" in header else ["train"] * len(body)
    )
    cells = zip(body.index, body[header.index("path")], labels, splits, strict=True)
    for place, path, label, split in cells:
        yield _Row(int(place), path, label, split)


def _require_columns(finding: Finding, header: Sequence[str]) -> None:
    missing = [name for name in ("path", "label") if name not in header]
    twice = [name for name in ("path", "label", "split") if header.count(name) > 1]
    if twice:
        raise finding.refuse(f"has more than one column {twice[0]!r}", "Keep one of them.")
    if missing:
        near = "".join(
            f"; for {name!r}{suggest(name, header)[1:]}" for name in missing if suggest(name, header)
        )
        commas = " with commas between the cells" if any(mark in c for c in header for mark in ";\t|") else ""
        raise finding.refuse(
            f"has no column {' and no column '.join(map(repr, missing))} (columns: {some(header)}{near})",
            f"Write path,label[,split] into the first line{commas}.",
        )


def _below_root(root: Path, path: str) -> str | None:
    """Return the path relative to the CSV's folder in plain form, or None if it lies outside."""
    if not path:
        return None
    full = os.path.normpath(root / path)
    for plain in (os.path.normpath, os.path.realpath):  # the second for absolute paths through a link
        top = plain(root)
        if full.startswith(os.path.join(top, "")):  # noqa: PTH118
            return Path(full).relative_to(top).as_posix()
    return None


def _row_fault(root: Path, row: _Row, path: str | None, first: dict[str, _Row]) -> str | None:
    """Say what is wrong with a row, or return None."""
    if not row.path:
        return "the path is empty"
    if fault := name_fault(row.label):
        return f"the label {row.label!r} {fault}"
    if row.split not in SPLIT_NAMES:
        return f"split {row.split!r} is none of train, val, test{suggest(row.split, SPLIT_NAMES)}"
    if path is None:
        return f"{row.path!r} lies outside the folder of the CSV file"
    if path in first:
        return _repeated(row, first[path])
    return None if (root / path).is_file() else f"{row.path!r} does not exist or is not a file"


def _repeated(row: _Row, before: _Row) -> str:
    """Say how a path came up before: in the other part is the grave one."""
    if SPLIT_NAMES[row.split] != SPLIT_NAMES[before.split]:
        return f"{row.path!r} is in {before.split} and again in {row.split}"
    return f"{row.path!r} is listed twice"


def _line(table: DataFrame, place: int) -> int:
    """Return the line of the file where a row starts, from 1: quoted cells may hold line breaks."""
    above = table[table.index < place]
    return 1 + place + sum(int(above[column].str.count("\n").sum()) for column in above.columns)
