"""Atomic writes, and tables that are safe to open in a spreadsheet."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from finetune.errors import DataError, DiskError, ExitCode
from finetune.runs import files
from finetune.runs.files import (
    disk_error,
    escape_formula,
    sync_folder,
    unescape_formula,
    write_bytes,
    write_csv,
    write_json,
    write_text,
)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- whole or not at all -------------------------------------------------------------------------


def test_new_content_replaces_the_old(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_bytes(path, b"old and longer")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert names_in(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "x"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(DiskError if isinstance(error, OSError) else KeyboardInterrupt):
            write_text(path, "new")
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["a.txt"]


def test_content_is_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        calls.append("folder" if Path(f"/proc/self/fd/{descriptor}").is_dir() else "file")
        fsync(descriptor)

    def note_replace(*paths: Any) -> None:
        calls.append("rename")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_text(tmp_path / "a.txt", "new")
    assert calls == ["file", "rename", "folder"]


def test_a_reader_never_sees_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    seen = []
    fsync = os.fsync

    def look(descriptor: int) -> None:
        seen.append(path.read_text())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    write_text(path, "new")
    assert seen == ["old", "new"]


LIMITED = """
import resource, sys
from pathlib import Path
from finetune.errors import FinetuneError
from finetune.runs.files import write_bytes

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_bytes(Path(sys.argv[1]), b"n" * 5000)
except FinetuneError as error:
    print(error)
    sys.exit(int(error.exit_code))
"""


def test_a_full_disk(tmp_path: Path) -> None:
    """A system limit on file sizes fails in the middle of a write, like a full disk."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    command = [sys.executable, "-c", LIMITED, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (ExitCode.DISK, "")
    assert result.stdout == (
        f"writing {path}: File too large\nFree some space, and start the same command again.\n"
    )
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["a.bin"]


def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        with Path("/dev/full").open("wb", buffering=0) as full:
            full.write(b"x")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DiskError) as fault:
        write_bytes(tmp_path / "a.bin", b"x")
    assert fault.value.exit_code == ExitCode.DISK == 74
    assert re.fullmatch(
        rf"writing {tmp_path / 'a.bin'}: No space left on device \([0-9,]+ MB free\)\n"
        "Free some space, and start the same command again.",
        str(fault.value),
    )


@pytest.mark.parametrize("name", ["missing/a.txt", "file/a.txt", "x" * 300, "taken"])
def test_a_path_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "taken").mkdir()
    with pytest.raises(DiskError) as fault:
        write_text(tmp_path / name, "new")
    assert fault.value.asked == f"writing {tmp_path / name}"
    is_long = len(name) > 255
    fix = "Take a shorter name" if is_long else "Choose a folder you may write to with --output"
    assert fault.value.fix.startswith(fix)
    assert names_in(tmp_path) == ["file", "taken"]


def test_a_file_system_that_cannot_sync_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(number, "x")

    monkeypatch.setattr(os, "fsync", fail)
    number = errno.EINVAL
    sync_folder(tmp_path)
    number = errno.EIO
    with pytest.raises(OSError, match="x"):
        sync_folder(tmp_path)


def test_an_error_without_a_number_has_a_message() -> None:
    assert disk_error(Path("a"), OSError("odd")).found == "odd"


# --- JSON ----------------------------------------------------------------------------------------


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"b": [1, 0.1, None, True], "a": "é名🦊", "c": 1e-300}
    write_json(path, value)
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert text.startswith('{\n  "b": [\n') and text.endswith("}\n") and "é名🦊" in text


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_json_has_no_nan(tmp_path: Path, number: float) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": number})
    assert json.loads(path.read_text()) == {"a": 1}


# --- formulas ------------------------------------------------------------------------------------

FORMULAS = [
    "=cmd()",
    "=1+1",
    "+x",
    "-x",
    "@x",
    "\tx",
    "\r=x",
    "\n=x",
    "+1+cmd()",
    "--1",
    "-1\n",
    "=",
    "-",
    "+",
    "@",
]
FORMULAS += ["+1.2.3", "-1e", "=-1", "-inf", "\uff1dcmd()", "\uff20x", "'=cmd()", "''-x", "-\u0661"]
HARMLESS = [
    "-1",
    "+1.5e3",
    "-.5",
    "+1.",
    "1",
    "x",
    "a=b",
    " =x",
    "",
    "'",
    "'x",
    "''",
    "'-1",
    "x-y",
    "1-2",
    "é",
]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_is_escaped(text: str) -> None:
    assert escape_formula(text) == f"'{text}"


@pytest.mark.parametrize("text", HARMLESS)
def test_other_text_and_numbers_stay(text: str) -> None:
    assert escape_formula(text) == text


def test_escaping_is_reversible_and_unambiguous() -> None:
    texts = [*FORMULAS, *HARMLESS]
    assert [unescape_formula(escape_formula(text)) for text in texts] == texts
    assert len({escape_formula(text) for text in texts}) == len(texts)


# --- tables --------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[list[str]]:
    return list(csv.reader(io.StringIO(path.read_bytes().decode(), newline="")))


def test_a_table(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    write_csv(path, [("x", 1, 0.5, True, None), ("y", -2, 1e-12, False, 3)], ("name", "n", "f", "b", "o"))
    assert path.read_bytes() == b"name,n,f,b,o\nx,1,0.5,True,\ny,-2,1e-12,False,3\n"


def test_a_table_without_rows_has_its_header(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [], ("path", "reason"))
    assert (tmp_path / "a.csv").read_text() == "path,reason\n"


NAMES = [
    "a,b",
    'a "b"',
    "a\nb",
    "a\r\nb",
    "a\rb",
    "é名🦊",
    "\u2028",
    "a;b",
    " a ",
    "\x85",
    "'",
    '"',
    "NULL",
    "nan",
    "1",
]


def test_any_name_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    names = [*NAMES, *FORMULAS, *HARMLESS]
    write_csv(path, [(name, 1) for name in names], ("path", *names))
    header, *rows = read_rows(path)
    assert [unescape_formula(name) for name in header] == ["path", *names]
    assert [unescape_formula(row[0]) for row in rows] == names


def test_headers_are_escaped(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [(1, 2)], ("=cmd()", "prob_x"))
    assert (tmp_path / "a.csv").read_text() == "'=cmd(),prob_x\n1,2\n"


def test_a_class_may_be_called_like_a_column(tmp_path: Path) -> None:
    """The confusion matrix has the column ``label`` and one per class."""
    write_csv(tmp_path / "a.csv", [("label", 1, 2), ("=x", 3, 4)], ("label", "label", "=x"))
    assert (tmp_path / "a.csv").read_text() == "label,label,'=x\nlabel,1,2\n'=x,3,4\n"


def test_paths_are_text_too(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [(Path("=cmd()"),)], ("path",))
    assert (tmp_path / "a.csv").read_text() == "path\n'=cmd()\n"


def test_a_float32_is_read_back(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**32, 20_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = np.concatenate([values[np.isfinite(values)], np.array([0, -0.0, 1, 1 / 3, 1e-45], np.float32)])
    write_csv(tmp_path / "a.csv", [(value,) for value in values.tolist()], ("p",))
    again = pd.read_csv(tmp_path / "a.csv")["p"].to_numpy(np.float32)
    assert again.view(np.uint32).tolist() == values.view(np.uint32).tolist()


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [(np.float32(-0.1), np.int64(-3), np.float64(0.1))], ("a", "b", "c"))
    assert (tmp_path / "a.csv").read_text() == "a,b,c\n-0.100000001,-3,0.1\n"


@pytest.mark.parametrize("text", ["a,b\nx\n", "a,b\nx,y,z\n", 'a,b\nx,"y', "a\nx\n", "", "a,b\n\udcff,y\n"])
def test_a_damaged_table_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError) as fault:
        files.read_rows(path, ("a", "b"))
    assert fault.value.exit_code == ExitCode.DATA and str(path) in fault.value.message


def test_a_table_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    write_csv(path, [("=x", "a\nb"), ("y", None)], ("a", "b"))
    assert files.read_rows(path, ("b",)) == [{"a": "=x", "b": "a\nb"}, {"a": "y", "b": ""}]
