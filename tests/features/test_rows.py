"""Rows in a file are those in memory, in whatever order and however many are read at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.errors import DataError
from finetune.features import rows as rows_module
from finetune.features.rows import FileRows, MemoryRows

NUM, WIDTH = 50, 6


@pytest.fixture
def memory() -> Tensor:
    return torch.randn(NUM, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def kept(tmp_path: Path, memory: Tensor) -> FileRows:
    (tmp_path / "rows").write_bytes(memory.numpy().tobytes())
    return FileRows(tmp_path / "rows", (NUM, WIDTH), torch.float32)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes of each read."""
    sizes: list[int] = []
    read = os.preadv

    def counted(file: int, buffers: list[Any], offset: int) -> int:
        sizes.append(sum(len(buffer) for buffer in buffers))
        return read(file, buffers, offset)

    monkeypatch.setattr(rows_module.os, "preadv", counted)
    yield sizes


@pytest.mark.parametrize(("max_gap", "max_read"), [(0, 1), (0, 100), (8, 100), (10**6, 10**6)])
@pytest.mark.parametrize(("start", "stop"), [(0, WIDTH), (0, 4), (1, 2), (3, WIDTH), (2, 2)])
def test_any_rows_and_columns(
    monkeypatch: pytest.MonkeyPatch,
    kept: FileRows,
    memory: Tensor,
    start: int,
    stop: int,
    max_gap: int,
    max_read: int,
) -> None:
    monkeypatch.setattr(rows_module, "MAX_GAP", max_gap)
    monkeypatch.setattr(rows_module, "MAX_READ", max_read)
    for indices in (
        torch.arange(NUM),
        torch.arange(NUM).flip(0),
        torch.randperm(NUM, generator=torch.Generator().manual_seed(1)),
        torch.tensor([3, 4, 5, 5, 6, 0, 1, 49]),
        torch.tensor([49]),
        torch.tensor([], dtype=torch.int64),
    ):
        expected = MemoryRows(memory).columns(indices, start, stop)
        assert kept.columns(indices, start, stop).equal(expected)


def test_rows_that_follow_each_other_are_read_together(
    monkeypatch: pytest.MonkeyPatch, kept: FileRows, calls: list[int]
) -> None:
    monkeypatch.setattr(rows_module, "MAX_READ", 20 * WIDTH * 4)
    kept[torch.arange(NUM)]
    assert calls == [20 * WIDTH * 4, 20 * WIDTH * 4, 10 * WIDTH * 4]
    calls.clear()
    kept.columns(torch.arange(10, 20), 1, 3)  # the features between are cheaper to read than to skip
    assert calls == [(9 * WIDTH + 2) * 4]
    calls.clear()
    kept[torch.tensor([7, 30, 31, 8])]
    assert calls == [WIDTH * 4, 2 * WIDTH * 4, WIDTH * 4]


def test_wide_rows_are_not_read_for_a_few_features(
    monkeypatch: pytest.MonkeyPatch, kept: FileRows, calls: list[int]
) -> None:
    monkeypatch.setattr(rows_module, "MAX_GAP", 4 * (WIDTH - 2) - 1)
    kept.columns(torch.arange(5), 1, 3)
    assert calls == 5 * [2 * 4]


@pytest.mark.parametrize("stop", [WIDTH, 2])
def test_a_file_that_was_cut_short_is_named(kept: FileRows, tmp_path: Path, stop: int) -> None:
    os.truncate(tmp_path / "rows", (NUM - 1) * WIDTH * 4)
    with pytest.raises(DataError, match="ends before row 50"):
        kept.columns(torch.arange(NUM), 0, stop)
