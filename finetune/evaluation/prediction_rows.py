"""Rows of predictions as CSV, JSON lines or Parquet.

CSV and JSON lines are appended to as they come. Parquet has its table of contents at the end, and nothing can
be appended to it: its rows come as JSON lines first, and are made into a table when all are there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from finetune.data.inputs import InputImage
from finetune.errors import EnvironmentFaultError, UsageError, suggest
from finetune.evaluation.predictor import Floats
from finetune.features.tables import Pipe
from finetune.runs.files import FLOAT_FORMAT, escape_formula, format_csv_line, write_chunks
from finetune.targets import name_answer_columns, rank_classes

RowFormat = Literal["csv", "jsonl", "parquet"]
FORMATS: tuple[RowFormat, ...] = get_args(RowFormat)
_SUFFIXES: dict[str, RowFormat] = {
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
_BLOCK_CELLS = 2**19
"""Of the rows that are made into a row group of Parquet at a time."""
Cell = str | float | bool | None


def find_format(output: Path, format: str | None) -> RowFormat:
    """Return the format that was named, else that of the output's suffix, else CSV.

    Raises:
        UsageError: an unknown one, or another than the suffix says; or the output is no name of a file.
        EnvironmentFaultError: it needs a package that is not installed.
    """
    if not output.name:  # "", ".", "/"
        raise UsageError("--output", "it names no file", "Name a .csv, .jsonl or .parquet file.")
    said = _SUFFIXES.get(output.suffix.lower())
    for known in FORMATS:
        if (format or said or "csv") == known:
            if said not in (None, known):
                found = f"--output {output} names a {output.suffix} file"
                raise UsageError(f"--format {known}", found, "Drop --format, or rename the output.")
            _check_installed(known)
            return known
    found = f"there is no such format{suggest(format or '', FORMATS)}"
    raise UsageError(f"--format {format}", found, f"Take {', '.join(FORMATS)}.")


def _check_installed(format: RowFormat) -> None:
    if format != "parquet":
        return
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        fix = "Run `pip install 'finetune[parquet]'`, or take --format csv or --format jsonl."
        raise EnvironmentFaultError("--format parquet", f"it needs pyarrow ({error})", fix) from None


@dataclass(frozen=True)
class PredictionRows:
    """What a row holds, and how it is written.

    Attributes:
        classes: in index order.
        format: of the file.
        top: how many classes are named, the likeliest first.
        reject_below: confidence under which no label is given; None gives one always.
    """

    classes: Sequence[str]
    format: RowFormat
    top: int = 1
    reject_below: float | None = None

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return name_answer_columns(self.classes, self.top, self.reject_below is not None)

    def is_rejected(self, values: Floats) -> bool:
        """Tell whether probabilities (K,) are too even for a label."""
        return self.reject_below is not None and bool(values.max() < self.reject_below)

    def header(self) -> bytes:
        """Return what stands before the first row."""
        return (
            format_csv_line([escape_formula(name) for name in self.columns]).encode() if self._is_csv else b""
        )

    @property
    def _is_csv(self) -> bool:
        return self.format == "csv"

    def line(self, path: str, values: Floats) -> bytes:
        """Return the row of an image with its probabilities (K,)."""
        cells = self._cells(path, values)
        if self._is_csv:
            return format_csv_line([_text(cell) for cell in cells]).encode()
        row = dict(zip(self.columns, map(_number, cells), strict=True))
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"

    def _cells(self, path: str, values: Floats) -> list[Cell]:
        best = [(self.classes[place], float(values[place])) for place in rank_classes(values, self.top)]
        is_rejected = self.is_rejected(values)
        cells: list[Cell] = [path, None if is_rejected else best[0][0], best[0][1]]
        if self.reject_below is not None:
            cells.append(is_rejected)
        for label, confidence in best[1:]:
            cells += [label, confidence]
        return [*cells, *values.tolist()]

    def convert(self, rows: Path, target: Path) -> None:
        """Make JSON lines a Parquet table, whole or not at all."""
        write_chunks(target, self._parquet(rows))

    def _parquet(self, rows: Path) -> Iterator[bytes]:
        import pyarrow as pa
        from pyarrow import parquet

        named = len(self.columns) - len(self.classes)
        kinds = [_kind(pa, name) for name in self.columns[:named]] + [pa.float32()] * len(self.classes)
        schema = pa.schema(list(zip(self.columns, kinds, strict=True)))
        pipe, size = Pipe(), max(1, _BLOCK_CELLS // len(schema))
        with rows.open("rb") as lines, parquet.ParquetWriter(pipe, schema) as file:
            while block := [json.loads(line) for line in islice(lines, size)]:
                columns = [pa.array([row[field.name] for row in block], field.type) for field in schema]
                file.write_table(pa.Table.from_arrays(columns, schema=schema))
                yield from pipe.taken()
        yield from pipe.taken()


def _kind(pa: Any, name: str) -> Any:
    """Return pyarrow's type of a column that is no class's."""
    if name == "rejected":
        return pa.bool_()
    return pa.float32() if name.startswith("confidence") else pa.string()


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return str(cell).lower()
    return FLOAT_FORMAT % cell if isinstance(cell, float) else escape_formula(cell)


def _number(cell: Cell) -> Any:
    """Nine digits read back to the same float32; JSON would write seventeen."""
    return float(FLOAT_FORMAT % cell) if isinstance(cell, float) else cell


# --- How far a prediction is, and of which images: what its journal keeps ---


@dataclass
class PredictionProgress:
    """How far the work is.

    Attributes:
        done: images that were looked at.
        digest: of their paths, sizes and times.
        bad: of them, could not be read.
        rejected: of them, got no label.
    """

    done: int = 0
    digest: str = ""
    bad: int = 0
    rejected: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return what the journal keeps."""
        return dict(vars(self))


class Fingerprint:
    """Sha256 of the images that went by: path, size and time of change of each."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, one: InputImage) -> None:
        """Count one more."""
        try:
            status = os.stat(one.file)  # noqa: PTH116
            facts = one.fault or f"{status.st_size} {status.st_mtime_ns}"
        except (OSError, ValueError):
            facts = one.fault or "gone"
        self._hash.update(f"{one.path}\0{facts}\n".encode())

    def value(self) -> str:
        """Return the sha256 so far."""
        return self._hash.hexdigest()
