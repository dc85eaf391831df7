"""What ``finetune predict`` writes: rows as CSV, JSON lines or Parquet, and the progress in its journal.

Rows are appended to CSV and JSON lines as they are computed. Nothing can be appended to Parquet, which has
its index at the end: its rows are JSON lines first, and are converted when all are there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self, get_args

from finetune.data.inputs import InputImage
from finetune.errors import EnvironmentFaultError, UsageError, suggest
from finetune.evaluation.predictor import Floats
from finetune.features.tables import Pipe
from finetune.runs.files import FLOAT_FORMAT, escape_formula, format_csv_line, write_chunks
from finetune.targets import SINGLE, Number, Target, rank_classes

RowFormat = Literal["csv", "jsonl", "parquet"]
FORMATS: tuple[RowFormat, ...] = get_args(RowFormat)
_SUFFIXES: dict[str, RowFormat] = {
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
_BLOCK_CELLS = 2**19
"""Largest number of cells of a Parquet row group."""
CellValue = str | float | bool | None


def find_format(output: Path, format: str | None) -> RowFormat:
    """Return the named format, else that of the output's suffix, else CSV.

    Raises:
        UsageError: the format is unknown or contradicts the suffix, or the output is not a file name.
        EnvironmentFaultError: the format needs a package that is not installed.
    """
    if not output.name:  # "", ".", "/"
        raise UsageError("--output", "it names no file", "Name a .csv, .jsonl or .parquet file.")
    by_suffix = _SUFFIXES.get(output.suffix.lower())
    for known in FORMATS:
        if (format or by_suffix or "csv") == known:
            if by_suffix not in (None, known):
                found = f"--output {output} names a {output.suffix} file"
                raise UsageError(f"--format {known}", found, "Drop --format, or rename the output.")
            _check_installed(known)
            return known
    found = f"there is no such format{suggest(format or '', FORMATS)}"
    raise UsageError(f"--format {format}", found, f"Choose {', '.join(FORMATS)}.")


def _check_installed(format: RowFormat) -> None:
    if format != "parquet":
        return
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        fix = "Run `pip install pyarrow`, or choose --format csv or --format jsonl."
        raise EnvironmentFaultError("--format parquet", f"it needs pyarrow ({error})", fix) from None


@dataclass(frozen=True)
class PredictionRows:
    """The columns of a row of predictions, and its text.

    Attributes:
        classes: class names in index order.
        format: the format of the file.
        top: number of classes named in a row, the most probable first.
        reject_below: confidence, in [0, 1], below which a row has no label; None to always give one.
        target: what the labels are; only one class an image has ``top`` and ``reject_below``.
    """

    classes: Sequence[str]
    format: RowFormat
    top: int = 1
    reject_below: float | None = None
    target: Target = SINGLE

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return self.target.answer_columns(self.classes, self.top, self.reject_below is not None)

    def check_options(self) -> None:
        """Refuse options that the model cannot follow.

        Raises:
            UsageError: more classes are to be named than there are, or a row has no single class.
        """
        asked = f"--top {self.top}" if self.top > 1 else f"--reject-below {self.reject_below}"
        if self.target != SINGLE and (self.top > 1 or self.reject_below is not None):
            found = f"the model gives {self.target.kind} labels, and not one class an image"
            raise UsageError(asked, found, "Leave it out.")
        if self.top > len(self.classes):
            found = f"the model has {len(self.classes)} classes"
            raise UsageError(asked, found, f"Choose {len(self.classes)} or fewer.")

    def is_rejected(self, values: Floats) -> bool:
        """Return whether the largest of the probabilities (K,) is too low for a label."""
        return self.reject_below is not None and bool(values.max() < self.reject_below)

    def header(self) -> bytes:
        """Return the bytes before the first row: the column names of a CSV file, else none."""
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

    def _cells(self, path: str, values: Floats) -> list[CellValue]:
        if isinstance(self.target, Number):
            value, margin = float(values[0]), self.target.margin
            return [path, value, *(() if margin is None else (value - margin, value + margin))]
        if self.target != SINGLE:
            return [path, self.target.answer(values, self.classes)[0], *values.tolist()]
        best = [(self.classes[index], float(values[index])) for index in rank_classes(values, self.top)]
        is_rejected = self.is_rejected(values)
        cells: list[CellValue] = [path, None if is_rejected else best[0][0], best[0][1]]
        if self.reject_below is not None:
            cells.append(is_rejected)
        for label, confidence in best[1:]:
            cells += [label, confidence]
        return [*cells, *values.tolist()]

    def convert(self, rows: Path, target: Path) -> None:
        """Convert JSON lines to a Parquet file, which appears only when it is complete."""
        write_chunks(target, self._parquet(rows))

    def _parquet(self, rows: Path) -> Iterator[bytes]:
        import pyarrow as pa
        from pyarrow import parquet

        texts = self.columns[: len(self.columns) - len(self.classes)]  # and the confidences
        kinds = [_kind(pa, name) if name in texts else pa.float32() for name in self.columns]
        schema = pa.schema(list(zip(self.columns, kinds, strict=True)))
        pipe, size = Pipe(), max(1, _BLOCK_CELLS // len(schema))
        with rows.open("rb") as lines, parquet.ParquetWriter(pipe, schema) as file:
            while block := [json.loads(line) for line in islice(lines, size)]:
                columns = [pa.array([row[field.name] for row in block], field.type) for field in schema]
                file.write_table(pa.Table.from_arrays(columns, schema=schema))
                yield from pipe.taken()
        yield from pipe.taken()


def _kind(pa: Any, name: str) -> Any:
    """Return the pyarrow type of a column other than the class probabilities."""
    if name == "rejected":
        return pa.bool_()
    return pa.string() if name == "path" or name.startswith("label") else pa.float32()


def _text(cell: CellValue) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return str(cell).lower()
    return FLOAT_FORMAT % cell if isinstance(cell, float) else escape_formula(cell)


def _number(cell: CellValue) -> Any:
    """Round to nine digits, which read back to the same float32; JSON would write seventeen."""
    return float(FLOAT_FORMAT % cell) if isinstance(cell, float) else cell


# --- the journal: progress, and a fingerprint of the images ---------------------------------------


@dataclass
class PredictionProgress:
    """The progress of a prediction.

    Attributes:
        done: number of images that were processed.
        digest: :class:`Fingerprint` of these images.
        bad: number of these images that could not be read.
        rejected: number of these images that have no label.
    """

    done: int = 0
    digest: str = ""
    bad: int = 0
    rejected: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON that the journal keeps."""
        return dict(vars(self))

    @classmethod
    def read(cls, note: Any) -> Self | None:
        """Return the progress of a journal's note; None if it is damaged."""
        if not isinstance(note, dict) or note.keys() != vars(cls()).keys():
            return None
        counts = [note[key] for key in ("bad", "rejected", "done")]
        is_sound = all(type(count) is int and count >= 0 for count in counts) and sum(counts[:2]) <= counts[2]
        return cls(**note) if is_sound and isinstance(note["digest"], str) else None


class Fingerprint:
    """The sha256 of the path, size and modification time of the images so far."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, image: InputImage) -> None:
        """Include one more image."""
        try:
            status = os.stat(image.file)  # noqa: PTH116
            facts = image.fault or f"{status.st_size} {status.st_mtime_ns}"
        except (OSError, ValueError):
            facts = image.fault or "gone"
        self._hash.update(f"{image.path}\0{facts}\n".encode())

    def value(self) -> str:
        """Return the sha256 so far."""
        return self._hash.hexdigest()
