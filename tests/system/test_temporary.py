"""Temporary files: where none can be made, the error says so."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from finetune.errors import DiskError, ExitCode
from finetune.runs.outcome import translated_errors
from finetune.system.temporary import temporary_file, temporary_folder


def test_they_last_as_long_as_they_are_used() -> None:
    with temporary_folder() as folder:
        (folder / "file").touch()
    assert not folder.exists()
    with temporary_file("w+", "ascii") as file:
        file.write("a")
        file.seek(0)
        assert file.read() == "a"


@pytest.fixture(params=["none is usable", "the named one is gone"])
def nowhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if request.param == "the named one is gone":
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
        return
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "gone")])


@pytest.mark.usefixtures("nowhere")
def test_a_folder_that_cannot_be_written_is_named() -> None:
    with pytest.raises(DiskError, match="gone") as of_file:
        temporary_file()
    with pytest.raises(DiskError, match="gone") as of_folder, temporary_folder():
        pass
    for caught in (of_file, of_folder):
        assert caught.value.exit_code == ExitCode.DISK and "TMPDIR" in caught.value.fix


def test_a_library_that_finds_none_is_understood(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "gone")])
    with pytest.raises(DiskError, match="No usable temporary directory"), translated_errors():
        tempfile.mkdtemp()


def test_errors_of_the_block_stay_what_they_are() -> None:
    with pytest.raises(PermissionError), temporary_folder():
        raise PermissionError
