"""Feature tables: path, label and split of each image, then its features layer by layer, as CSV, Parquet or
npz.

A table is written atomically and in blocks: memory does not grow with the number of images.

Shape legend: N images of the table, B of them, D features of a layer for each.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple
from zipfile import ZipFile, ZipInfo

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib import format as npy
from torch import Tensor

from finetune.errors import EnvironmentFaultError, InternalError, UsageError
from finetune.features.rows import Rows
from finetune.runs.files import FLOAT_FORMAT, escape_formula, format_csv_line, write_chunks

TableFormat = Literal["csv", "parquet", "npz"]
Floats = npt.NDArray[np.float32]
WHO = ("path", "label", "split")
"""The first columns of every table."""
BLOCK_BYTES = 64 * 2**20
"""Bytes of the rows of all layers that are read at a time, and of a row group of Parquet."""
_TEXTS = 4096
"""Number of strings of an npz file that are converted at a time; each takes four bytes per character of the
longest."""
_REPORT = "Please report this, with the command."


@dataclass(frozen=True)
class LayerRows:
    """Features of one layer.

    Attributes:
        name: name of the layer; its columns are ``<name>.0``, ``<name>.1`` and so on.
        rows: features of all images, (N, D).
    """

    name: str
    rows: Rows

    @property
    def size(self) -> int:
        """Number of features of an image (D)."""
        return self.rows.shape[1]


class _Block(NamedTuple):
    """B rows of the table: path, label and split of each (``who``), and (B, D) features of each layer."""

    who: Sequence[tuple[str, str, str]]
    layers: list[Floats]


@dataclass(frozen=True)
class _Table:
    """Arguments of :func:`write_table`."""

    images: Sequence[tuple[str, str, str]]
    keep: Tensor
    layers: Sequence[LayerRows]
    advance: Callable[[int], None]

    def columns(self) -> Iterator[str]:
        """Yield the names of the feature columns."""
        return (f"{layer.name}.{place}" for layer in self.layers for place in range(layer.size))

    def blocks(self, layers: Sequence[LayerRows]) -> Iterator[_Block]:
        """Yield rows in blocks; ``advance`` is called after a block was written."""
        num_rows = max(1, BLOCK_BYTES // max(1, 4 * sum(layer.size for layer in layers)))
        for indices in torch.split(self.keep, num_rows):
            who = [self.images[index] for index in indices.tolist()]
            yield _Block(who, [_floats(layer, indices) for layer in layers])
            self.advance(len(indices) * len(layers))


def _floats(layer: LayerRows, indices: Tensor) -> Floats:
    """Return rows (B, D) of a layer.

    Raises:
        InternalError: a row contains NaN.
    """
    rows = layer.rows[indices].to("cpu", torch.float32)
    holes = rows.isnan().any(dim=1)
    if holes.any():
        found = f"row {int(indices[holes][0])} of the layer {layer.name!r} holds a NaN"
        raise InternalError("writing a feature table", found, _REPORT)
    floats: Floats = rows.contiguous().numpy()
    return floats


def check_format(format: TableFormat) -> None:
    """Check that a format can be written here; to be called before anything is computed.

    Raises:
        EnvironmentFaultError: it is ``parquet``, and pyarrow is not installed or cannot be loaded.
    """
    if format != "parquet":
        return
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        fix = "Run `pip install pyarrow`, or take --format csv or --format npz."
        raise EnvironmentFaultError("--format parquet", f"it needs pyarrow ({error})", fix) from None


def check_names(format: TableFormat, layers: Sequence[str]) -> None:
    """Check that no two columns of a table get the same name; to be called before anything is computed.

    Raises:
        UsageError: a layer is called ``path``, ``label`` or ``split``, and the format is ``npz``, where
            the arrays are named like the layers.
        InternalError: two layers have the same name.
    """
    if len(set(layers)) < len(layers):
        raise InternalError("writing a feature table", "two layers have one name", _REPORT)
    if format == "npz" and (taken := [layer for layer in layers if layer in WHO]):
        found = f"the layer {taken[0]!r} is called like an array that every table has"
        raise UsageError("--format npz", found, "Take --format csv or --format parquet.")


def write_table(
    path: Path,
    format: TableFormat,
    images: Sequence[tuple[str, str, str]],
    keep: Tensor,
    layers: Sequence[LayerRows],
    advance: Callable[[int], None],
) -> None:
    """Write a table of images to a temporary file and rename it.

    ``csv``: ``path,label,split`` and the columns of each layer. Numbers read back to the same float32, and
    no spreadsheet takes a text for a formula (``unescape_formula`` gives it back as it was).
    ``parquet``: the same columns, float32, with texts as they are.
    ``npz``: ``numpy.load`` gives the arrays ``path``, ``label`` and ``split`` of texts (N,), and one float32
    array (N, D) under the name of each layer.

    Args:
        path: file to write; an existing file is replaced.
        format: file format.
        images: path, label and split of every image that the layers have a row of.
        keep: (N,) int64, indices of the images in the table, in its order.
        layers: features, in the order of their columns.
        advance: called with the number of rows that were written, N times the number of layers in total.

    Raises:
        DiskError: the disk is full, or the folder cannot be written. Nothing new is left under the name.
        InternalError: a row of ``keep`` holds a NaN, as one that was never computed does, or a name stands
            twice in ``layers``.
        EnvironmentFaultError: as :func:`check_format`.
        UsageError: as :func:`check_names`.
    """
    check_format(format)
    check_names(format, [layer.name for layer in layers])
    writers: dict[TableFormat, Callable[[_Table], Iterator[bytes]]]
    writers = {"csv": _csv, "parquet": _parquet, "npz": _npz}
    write_chunks(path, writers[format](_Table(images, keep, layers, advance)))


def _csv(table: _Table) -> Iterator[bytes]:
    """Yield the lines of a CSV file.

    One template for all numbers of a row: measured on 2,048 of them, 3.6 times as fast as ``csv.writer``
    on formatted cells, and 2.7 times as fast as the shortest text of each float32.
    """
    yield _text([*WHO, *table.columns()]) + b"\n"
    numbers = (f",{FLOAT_FORMAT}" * sum(layer.size for layer in table.layers) + "\n").encode()
    for block in table.blocks(table.layers):
        for who, *rows in zip(block.who, *block.layers, strict=True):
            yield _text(who) + numbers % tuple(np.concatenate(rows).tolist())


def _text(cells: Sequence[str]) -> bytes:
    """Return the start of a CSV line: texts, quoted where they must be."""
    return format_csv_line([escape_formula(cell) for cell in cells]).removesuffix("\n").encode()


def _parquet(table: _Table) -> Iterator[bytes]:
    """Yield the bytes of a Parquet file, a row group for each block."""
    import pyarrow as pa
    from pyarrow import parquet

    texts, floats = [(name, pa.string()) for name in WHO], [(name, pa.float32()) for name in table.columns()]
    schema, pipe = pa.schema(texts + floats), Pipe()
    with parquet.ParquetWriter(pipe, schema, use_dictionary=["label", "split"]) as file:
        for block in table.blocks(table.layers):
            who = [[row[place] for row in block.who] for place in range(len(WHO))]
            numbers = [column for rows in block.layers for column in np.ascontiguousarray(rows.T)]
            columns = [
                pa.array(column, kind) for column, kind in zip(who + numbers, schema.types, strict=True)
            ]
            file.write_table(pa.Table.from_arrays(columns, schema=schema))
            yield from pipe.taken()
    yield from pipe.taken()


def _npz(table: _Table) -> Iterator[bytes]:
    """Yield the bytes of a zip file of arrays that are not compressed, as ``numpy.savez`` writes it."""
    indices, pipe = table.keep.tolist(), Pipe()
    with ZipFile(pipe, "w") as archive:
        for place, name in enumerate(WHO):
            texts = [table.images[index][place] for index in indices]
            kind = f"<U{max([1, *map(len, texts)])}"
            parts = (np.array(texts[start : start + _TEXTS], kind) for start in range(0, len(texts), _TEXTS))
            yield from _array(archive, pipe, name, kind, (len(texts),), parts)
        for layer in table.layers:
            rows = (block.layers[0] for block in table.blocks([layer]))
            yield from _array(archive, pipe, layer.name, "<f4", (len(indices), layer.size), rows)
    yield from pipe.taken()


def _array(
    archive: ZipFile, pipe: Pipe, name: str, kind: str, shape: tuple[int, ...], parts: Iterator[Any]
) -> Iterator[bytes]:
    """Yield the bytes of one array of an npz file; ``parts`` are blocks of its rows."""
    member = ZipInfo(f"{name}.npy")  # with a fixed time, so that the same rows give the same file
    with archive.open(member, "w", force_zip64=True) as file:
        header = {"descr": kind, "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(part).view(np.uint8).data)
            yield from pipe.taken()


class Pipe(io.RawIOBase):
    """A file object for libraries that write to one; :meth:`taken` returns what they wrote."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def writable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the number of bytes written so far."""
        return self._size

    def write(self, content: Any) -> int:
        """Store a copy of some bytes until they are taken; return their number."""
        self._parts.append(bytes(content))
        self._size += len(self._parts[-1])
        return len(self._parts[-1])

    def taken(self) -> list[bytes]:
        """Return what was written since the last call."""
        parts, self._parts = self._parts, []
        return parts
