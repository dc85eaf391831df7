"""Feature tables: what is read back has the same bits, and a table is there whole or not at all."""

from __future__ import annotations

import errno
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from finetune.errors import DiskError, EnvironmentFaultError, InternalError, UsageError
from finetune.features import tables
from finetune.features.rows import FileRows, MemoryRows
from finetune.features.tables import LayerRows, check_format, check_names, write_table
from finetune.runs.files import unescape_formula

FORMATS: tuple[tables.TableFormat, ...] = ("csv", "parquet", "npz")
NAMES = [
    "a,b",
    'a "b"',
    "a\nb",
    "a\r\nb",
    "a\rb",
    "é名🦊",
    "=cmd()",
    "@x",
    "'=x",
    "-1",
    "",
    " a ",
    "nan",
    "NULL",
]
PICTURES = [(f"{name}/1.jpg", name, ("train", "val", "test")[n % 3]) for n, name in enumerate(NAMES)]
KEEP = torch.tensor([13, 0, 6, *range(1, 6), *range(7, 12)])
"""In an order of its own, and without number 12."""


def any_floats(shape: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Bits drawn at random, and numbers that formats get wrong: everything but NaN."""
    values = np.random.default_rng(0).integers(0, 2**32, shape, dtype=np.uint32).view(np.float32).copy()
    special = [0, -0.0, 1, 1 / 3, 1e-45, -3.4028235e38, 16777216, np.inf, -np.inf]
    values.reshape(-1)[: len(special)] = special
    values[np.isnan(values)] = 0.1
    return values


FIRST, SECOND = any_floats((len(NAMES), 9)), any_floats((len(NAMES), 4))[::-1].copy()


@pytest.fixture
def layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[LayerRows]:
    """Two layers, one in memory and one in a file; blocks hold two rows."""
    monkeypatch.setattr(tables, "BLOCK_BYTES", 2 * 13 * 4 + 3)
    monkeypatch.setattr(tables, "_TEXTS", 4)
    kept = tmp_path / "kept" / "rows"
    kept.parent.mkdir()
    SECOND.tofile(kept)
    second = FileRows(kept, (len(NAMES), 4), torch.float32)
    return [LayerRows("layer1.0", MemoryRows(torch.from_numpy(FIRST))), LayerRows("=fc", second)]


def write(
    folder: Path, format: tables.TableFormat, layers: list[LayerRows], keep: torch.Tensor = KEEP
) -> Path:
    path = folder / f"features.{format}"
    write_table(path, format, PICTURES, keep, layers, lambda _: None)
    return path


def assert_bits(found: Any, expected: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    found = np.asarray(found)
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert (found.view(np.uint32) == expected.view(np.uint32)).all()


def assert_images(frame: pd.DataFrame) -> None:
    found = list(zip(frame["path"], frame["label"], frame["split"], strict=True))
    assert found == [PICTURES[index] for index in KEEP.tolist()]


# --- what is read back ---------------------------------------------------------------------------


def test_csv(tmp_path: Path, layers: list[LayerRows]) -> None:
    path = write(tmp_path, "csv", layers)
    frame = pd.read_csv(path, dtype=str, keep_default_na=False, lineterminator="\n")
    first, second = [f"layer1.0.{i}" for i in range(9)], [f"'=fc.{i}" for i in range(4)]
    assert list(frame.columns) == ["path", "label", "split", *first, *second]
    assert_bits(frame[first].to_numpy(np.float64).astype(np.float32), FIRST[KEEP])
    assert_bits(frame[second].to_numpy(np.float64).astype(np.float32), SECOND[KEEP])
    for name in ("path", "label"):
        frame[name] = frame[name].map(unescape_formula)
    assert_images(frame)
    assert b"'=cmd(),train," in path.read_bytes()


def test_csv_by_plain_pandas(tmp_path: Path) -> None:
    rows = np.random.default_rng(1).normal(size=(len(NAMES), 50)).astype(np.float32)
    path = write(tmp_path, "csv", [LayerRows("pool", MemoryRows(torch.from_numpy(rows)))])
    frame = pd.read_csv(path, keep_default_na=False)
    assert_bits(frame.iloc[:, 3:].to_numpy(np.float32), rows[KEEP])


def test_csv_to_the_byte(tmp_path: Path) -> None:
    rows = MemoryRows(torch.tensor([[0.5, -1e-12], [3, 0.1]]))
    path = tmp_path / "a.csv"
    write_table(
        path,
        "csv",
        [("a/1.jpg", "a", "train"), ("b,c/1.jpg", "b,c", "val")],
        torch.tensor([1, 0]),
        [LayerRows("x", rows)],
        lambda _: None,
    )
    assert path.read_bytes() == (
        b"path,label,split,x.0,x.1\n"
        b'"b,c/1.jpg","b,c",val,3,0.100000001\n'
        b"a/1.jpg,a,train,0.5,-9.99999996e-13\n"
    )


def test_parquet(tmp_path: Path, layers: list[LayerRows]) -> None:
    path = write(tmp_path, "parquet", layers)
    frame = pd.read_parquet(path)
    assert_images(frame)
    assert_bits(frame[[f"layer1.0.{i}" for i in range(9)]].to_numpy(), FIRST[KEEP])
    assert_bits(frame[[f"=fc.{i}" for i in range(4)]].to_numpy(), SECOND[KEEP])
    file = pq.ParquetFile(path)
    assert {str(kind) for kind in file.schema_arrow.types[3:]} == {"float"}
    assert file.num_row_groups == 7, "not written in blocks"


def test_npz(tmp_path: Path, layers: list[LayerRows]) -> None:
    path = write(tmp_path, "npz", layers)
    with np.load(path, allow_pickle=False) as arrays:
        assert set(arrays) == {"path", "label", "split", "layer1.0", "=fc"}
        assert_images(pd.DataFrame({name: arrays[name] for name in ("path", "label", "split")}))
        assert_bits(arrays["layer1.0"], FIRST[KEEP])
        assert_bits(arrays["=fc"], SECOND[KEEP])
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize("format", FORMATS)
def test_a_table_without_rows(tmp_path: Path, layers: list[LayerRows], format: tables.TableFormat) -> None:
    path = write(tmp_path, format, layers, KEEP[:0])
    if format == "npz":
        with np.load(path) as arrays:
            assert arrays["path"].shape == (0,) and arrays["=fc"].shape == (0, 4)
    else:
        frame = pd.read_csv(path) if format == "csv" else pd.read_parquet(path)
        assert frame.shape == (0, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rows_of_another_type_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = torch.from_numpy(FIRST).clamp(-1000, 1000).to(dtype)
    path = write(tmp_path, "npz", [LayerRows("x", MemoryRows(rows))])
    with np.load(path) as arrays:
        assert_bits(arrays["x"], rows[KEEP].float().numpy())


# --- how it is written ---------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_rows_give_the_same_file(
    tmp_path: Path, layers: list[LayerRows], monkeypatch: pytest.MonkeyPatch, format: tables.TableFormat
) -> None:
    first = write(tmp_path, format, layers).read_bytes()
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert write(tmp_path, format, layers).read_bytes() == first


@pytest.mark.parametrize("format", FORMATS)
def test_every_row_is_told(tmp_path: Path, layers: list[LayerRows], format: tables.TableFormat) -> None:
    told: list[int] = []
    write_table(tmp_path / "a", format, PICTURES, KEEP, layers, told.append)
    assert sum(told) == len(KEEP) * len(layers)
    assert len(told) > 2


class BigRows:
    """Rows that are made when they are asked for, and counted."""

    shape = (50_000, 200)
    most = 0

    def __getitem__(self, indices: torch.Tensor) -> torch.Tensor:
        self.most = max(self.most, len(indices))
        return torch.rand(len(indices), self.shape[1])

    def columns(self, indices: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("format", ["parquet", "npz"])
def test_memory_does_not_grow_with_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: tables.TableFormat
) -> None:
    import tracemalloc

    monkeypatch.setattr(tables, "BLOCK_BYTES", 400_000)
    rows, images = BigRows(), [("a", "b", "train")] * 50_000
    tracemalloc.start()
    write_table(tmp_path / "a", format, images, torch.arange(25_000), [LayerRows("x", rows)], lambda _: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows.most == 500
    assert peak < 6e6, "20 MB of rows went through"


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_full_disk_leaves_nothing_new(
    tmp_path: Path,
    layers: list[LayerRows],
    monkeypatch: pytest.MonkeyPatch,
    format: tables.TableFormat,
    old: bytes | None,
) -> None:
    """The system's limit on file sizes fails in the middle of a write, as a full disk does."""
    import resource
    import signal

    path = tmp_path / f"features.{format}"
    if old is not None:
        path.write_bytes(old)
    before = {entry.name for entry in tmp_path.iterdir()}
    monkeypatch.setattr("finetune.features.tables._TEXTS", 1)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))
    try:
        with pytest.raises(DiskError, match="File too large"):
            write(tmp_path, format, layers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {entry.name for entry in tmp_path.iterdir()} == before
    assert old is None or path.read_bytes() == old


@pytest.mark.parametrize("format", FORMATS)
def test_no_space_left(
    tmp_path: Path, layers: list[LayerRows], monkeypatch: pytest.MonkeyPatch, format: tables.TableFormat
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DiskError) as fault:
        write(tmp_path, format, layers)
    assert fault.value.is_full
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_that_was_never_computed(
    tmp_path: Path, layers: list[LayerRows], format: tables.TableFormat
) -> None:
    broken = FIRST.copy()
    broken[12] = np.nan
    layers[0] = LayerRows("layer1.0", MemoryRows(torch.from_numpy(broken)))
    write(tmp_path, format, layers).unlink()  # 12 is not kept
    with pytest.raises(InternalError, match=r"row 12 of the layer 'layer1\.0' holds a NaN"):
        write(tmp_path, format, layers, torch.arange(len(NAMES)))
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]


def test_pyarrow_is_missing(tmp_path: Path, layers: list[LayerRows], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(EnvironmentFaultError, match=r"pip install pyarrow"):
        check_format("parquet")
    with pytest.raises(EnvironmentFaultError):
        write(tmp_path, "parquet", layers)
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]
    for format in ("csv", "npz"):
        check_format(format)
        write(tmp_path, format, layers)


def test_names_that_would_stand_twice() -> None:
    check_names("csv", ["label", "label.0"])
    check_names("npz", ["layer1", "layer1.0"])
    with pytest.raises(UsageError, match="the layer 'label' is called like"):
        check_names("npz", ["x", "label"])
    with pytest.raises(InternalError, match="two layers"):
        check_names("csv", ["x", "y", "x"])
