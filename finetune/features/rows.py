"""Rows of numbers, one a picture, that are in memory or stay in their file.

Shape legend: N pictures, B of them, D numbers for each.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from finetune.errors import DataError


class Rows(Protocol):
    """Rows (N, D) of pictures.

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
        """Return the numbers from ``start`` up to ``stop`` of rows, (B, stop - start)."""
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
        """Return the numbers from ``start`` up to ``stop`` of rows, (B, stop - start)."""
        return self.tensor[indices, start:stop]


class FileRows:
    """Rows that stay in their file.

    They are read, not mapped: mapped pages would count as memory of this process, which then grows with the
    folder.

    Args:
        path: of the rows, one after the other.
        shape: (N, D).
        dtype: of the rows.
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
        """Return the numbers from ``start`` up to ``stop`` of rows, (B, stop - start).

        Raises:
            DataError: the file was cut short.
        """
        rows = torch.empty(len(indices), stop - start, dtype=self._dtype)
        content: Any = rows.view(torch.uint8).view(-1).numpy()
        num_bytes, size = rows.shape[1] * self._dtype.itemsize, self._dtype.itemsize
        for place, index in enumerate(indices.tolist()):
            part = content[place * num_bytes : (place + 1) * num_bytes]
            done = os.preadv(self._file.fileno(), [part], (index * self.shape[1] + start) * size)
            if done != num_bytes:  # one call reads up to 2 GB of a file on a disk
                found = f"{self._file.name} ends before row {index + 1}"
                fix = "Run `finetune cache clear`, and start the same command again."
                raise DataError("reading kept features", found, fix)
        return rows
