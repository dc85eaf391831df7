"""Feature rows, one for each image, in memory or in a file.

Shape legend: N images, B of them, D features for each.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from finetune.errors import DataError


class Rows(Protocol):
    """Rows (N, D) of images.

    Attributes:
        shape: (N, D).
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        ...

    def __getitem__(self, indices: Tensor, /) -> Tensor:
        """Return rows (B, D)."""
        ...

    def columns(self, indices: Tensor, start: int, stop: int) -> Tensor:
        """Return the features ``start`` to ``stop`` (exclusive) of rows, (B, stop - start)."""
        ...


class MemoryRows:
    """Rows that are a tensor (N, D)."""

    def __init__(self, rows: Tensor) -> None:
        self.tensor = rows

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        return len(self.tensor), self.tensor.shape[1]

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return rows (B, D)."""
        return self.tensor[indices]

    def columns(self, indices: Tensor, start: int, stop: int) -> Tensor:
        """Return the features ``start`` to ``stop`` (exclusive) of rows, (B, stop - start)."""
        return self.tensor[indices, start:stop]


MAX_GAP = 2**14
"""Bytes between two rows' parts that are read too rather than skipped: one more call takes as long."""
MAX_READ = 2**19
"""Bytes that one call reads, unless a single row is longer: what a processor's cache holds."""


class FileRows:
    """Rows that stay in their file.

    The file is read, not mapped: mapped pages count as memory of the process, which would grow with the file.
    Rows that follow each other in the file are read together.

    Args:
        path: file of the rows, row after row, without a header.
        shape: (N, D).
        dtype: type of the features in the file.
    """

    def __init__(self, path: Path, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self._file = path.open("rb", buffering=0)
        self.shape, self._dtype = shape, dtype

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return rows (B, D).

        Raises:
            DataError: the file was cut short.
        """
        return self.columns(indices, 0, self.shape[1])

    def columns(self, indices: Tensor, start: int, stop: int) -> Tensor:
        """Return the features ``start`` to ``stop`` (exclusive) of rows, (B, stop - start).

        Raises:
            DataError: the file was cut short.
        """
        width, whole, size = stop - start, self.shape[1], self._dtype.itemsize
        rows = torch.empty(len(indices), width, dtype=self._dtype)
        at_once = max(1, MAX_READ // (whole * size)) if (whole - width) * size <= MAX_GAP else 1
        between = torch.empty(min(at_once, len(indices)) if width < whole else 0, whole, dtype=self._dtype)
        place = 0
        for first, number in _find_runs(indices.tolist(), at_once):
            numel = (number - 1) * whole + width  # from the first row's part to the last one's
            part = rows[place : place + number]
            is_direct = width == whole or number == 1
            found = part if is_direct else between[:number]
            self._read(found.view(-1)[:numel], first * whole + start, first + number)
            if not is_direct:
                part.copy_(found[:, :width])
            place += number
        return rows

    def _read(self, part: Tensor, offset: int, end: int) -> None:
        """Fill a tensor (numel,) from an offset in features; ``end`` is the last row, counted from 1."""
        content: Any = part.view(torch.uint8).numpy()
        done = os.preadv(self._file.fileno(), [content], offset * self._dtype.itemsize)
        if done != len(content):  # one call reads up to 2 GB of a file on a disk
            found = f"{self._file.name} ends before row {end}"
            fix = "Run `finetune cache clear`, and start the same command again."
            raise DataError("reading kept features", found, fix)


def _find_runs(indices: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Yield first index and length of runs in which each index follows the one before, at most ``most``."""
    first = number = 0
    for index in indices:
        if number and number < most and index == first + number:
            number += 1
            continue
        if number:
            yield first, number
        first, number = index, 1
    if number:
        yield first, number


class ChainRows:
    """Rows of several sets of images, one set after the other.

    Args:
        parts: each (N, D), with the same D.
    """

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = tuple(parts)
        self._ends = torch.tensor([part.shape[0] for part in parts]).cumsum(0)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        return int(self._ends[-1]), self._parts[0].shape[1]

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return rows (B, D)."""
        return self.columns(indices, 0, self.shape[1])

    def columns(self, indices: Tensor, start: int, stop: int) -> Tensor:
        """Return the features ``start`` to ``stop`` (exclusive) of rows, (B, stop - start)."""
        owners = torch.searchsorted(self._ends, indices, right=True)
        rows: Tensor | None = None
        for number, part in enumerate(self._parts):
            mine = owners == number
            if mine.any():
                begin = int(self._ends[number]) - part.shape[0]
                found = part.columns(indices[mine] - begin, start, stop)
                rows = found.new_empty(len(indices), stop - start) if rows is None else rows
                rows[mine] = found
        return rows if rows is not None else torch.empty(0, stop - start)


class ConcatRows:
    """Rows of the same images from several layers, side by side.

    Args:
        layers: each (N, D), with the same N.
    """

    def __init__(self, layers: Sequence[Rows]) -> None:
        self._layers = tuple(layers)
        self._ends = torch.tensor([layer.shape[1] for layer in layers]).cumsum(0).tolist()

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D + D' + ...)."""
        return self._layers[0].shape[0], self._ends[-1]

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return rows (B, D + D' + ...)."""
        return torch.cat([layer[indices] for layer in self._layers], dim=1)

    def columns(self, indices: Tensor, start: int, stop: int) -> Tensor:
        """Return the features ``start`` to ``stop`` (exclusive) of rows, (B, stop - start)."""
        found = []
        for layer, end in zip(self._layers, self._ends, strict=True):
            begin = end - layer.shape[1]
            low, high = max(start, begin), min(stop, end)
            if low < high:
                found.append(layer.columns(indices, low - begin, high - begin))
        return torch.cat(found, dim=1)


class SubsetRows:
    """A subset of rows, in the order of its indices.

    Args:
        rows: (N, D).
        indices: (M,) int64, the rows of the subset.
    """

    def __init__(self, rows: Rows, indices: Tensor) -> None:
        self._rows, self._indices = rows, indices

    @property
    def shape(self) -> tuple[int, int]:
        """(M, D)."""
        return len(self._indices), self._rows.shape[1]

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return rows (B, D)."""
        return self._rows[self._indices[indices]]

    def columns(self, indices: Tensor, start: int, stop: int) -> Tensor:
        """Return the features ``start`` to ``stop`` (exclusive) of rows, (B, stop - start)."""
        return self._rows.columns(self._indices[indices], start, stop)
