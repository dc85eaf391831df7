"""A folder of results is complete or not there, and one process at a time writes it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.errors import DiskError, UsageError
from finetune.runs import claim
from finetune.runs.new_folder import new_folder


def files_in(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write(path: Path, text: str) -> None:
    with new_folder(path) as folder:
        (folder / "a.csv").write_text(text)
        (folder / "plots").mkdir()
        (folder / "plots/b.svg").write_text(text)


def test_the_content_appears_when_the_block_ends(tmp_path: Path) -> None:
    with new_folder(tmp_path / "new/out") as folder:
        (folder / "a.csv").write_text("a")
        assert folder.name == "out"  # a report shows the name of its folder
        assert not (tmp_path / "new/out/a.csv").exists()
    assert files_in(tmp_path) == {"new/out/a.csv": "a"}
    with pytest.raises(UsageError, match="not empty"), new_folder(tmp_path / "new/out"):
        pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_block_that_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "old").mkdir()
    for path in (tmp_path / "new", tmp_path / "old"):
        with pytest.raises(error), new_folder(path) as folder:
            (folder / "file").touch()
            raise error
    assert list(tmp_path.rglob("*")) == [tmp_path / "old"]


def test_files_and_folders_that_hold_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/.hidden").write_text("precious")
    before = files_in(tmp_path)
    for name, said in (("file", "it is a file"), ("full", "not empty")):
        with pytest.raises(UsageError, match=said), new_folder(tmp_path / name):
            pass
    assert files_in(tmp_path) == before


def test_the_working_directory_and_links_to_folders_may_be_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    monkeypatch.chdir(tmp_path / "here")
    with new_folder(Path()) as folder:
        (folder / "a.csv").touch()
        assert folder.name == "here"
    (tmp_path / "here/a.csv").unlink()
    write(tmp_path / "link", "b")
    assert files_in(tmp_path / "here") == {"a.csv": "b", "plots/b.svg": "b"}


def test_one_process_writes_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "LOCK_WAIT", 0.0)
    with new_folder(tmp_path / "out") as first:
        with pytest.raises(UsageError, match="another process"), new_folder(tmp_path / "out"):
            pass
        (first / "file").write_text("first")
    assert files_in(tmp_path) == {"out/file": "first"}


KILLED = """
import os, signal, sys
from pathlib import Path
from finetune.runs import files
from finetune.runs.new_folder import new_folder
calls = int(sys.argv[2])
def counted(rename):
    def call(path, target):
        global calls
        calls -= 1
        if calls < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, target)
    return call
Path.rename, files.rename_to_new = counted(Path.rename), counted(files.rename_to_new)
with new_folder(Path(sys.argv[1])) as folder:
    for name in ("a", "b", "c"):
        (folder / name).write_text("of the killed process")
"""


@pytest.mark.parametrize("calls", range(4))
def test_after_a_kill_at_any_rename_the_folder_is_made_again_or_whole(tmp_path: Path, calls: int) -> None:
    path = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), str(calls)], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    if calls == 0:  # killed before the content was complete
        write(path, "again")
        assert files_in(path) == {"a.csv": "again", "plots/b.svg": "again"}
        return
    with pytest.raises(UsageError, match="not empty"):  # it is whole, and stays
        write(path, "again")
    assert files_in(path) == dict.fromkeys("abc", "of the killed process")


@pytest.mark.parametrize("name", [".unfinished", ".finished", ".finished/out"])
def test_a_link_in_place_of_a_folder_of_ours_is_not_followed(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    (victim / "inner").mkdir(parents=True)
    (victim / "inner/precious").write_text("kept")
    link = tmp_path / "out" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(victim)
    with pytest.raises(UsageError, match="not empty"):
        write(tmp_path / "out", "new")
    assert files_in(victim) == {"inner/precious": "kept"}


def test_leftovers_that_are_too_deep_to_remove_are_named(tmp_path: Path) -> None:
    inner = os.open(tmp_path, os.O_RDONLY)
    for name in ("out", ".unfinished", *["d"] * 1500):  # a path of this length has no name
        os.mkdir(name, dir_fd=inner)
        inner, outer = os.open(name, os.O_RDONLY, dir_fd=inner), inner
        os.close(outer)
    os.close(inner)
    with pytest.raises(DiskError, match="nested too deeply"):
        write(tmp_path / "out", "new")
    subprocess.run(["rm", "-rf", tmp_path / "out"], check=True)  # pytest cannot either


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with (
        pytest.raises(UsageError, match=r"a\.csv was made by something else"),
        new_folder(path) as folder,
    ):
        (folder / "a.csv").write_text("ours")
        (path / "a.csv").write_text("theirs")
    assert (path / "a.csv").read_text() == "theirs"
    (path / "a.csv").rename(tmp_path / "away.csv")
    with pytest.raises(UsageError, match="not empty"):  # the results have moved up
        write(path, "again")
    assert files_in(path) == {"a.csv": "ours"}


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_folder_has_the_permissions_of_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "out", "x")
        assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask
        assert (tmp_path / "out/plots").stat().st_mode & 0o777 == 0o777 & ~umask
    finally:
        os.umask(before)


def test_a_folder_that_is_removed_meanwhile_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DiskError), new_folder(tmp_path / "out"):
        shutil.rmtree(tmp_path / "out")


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not UTF-8"), new_folder(tmp_path / "a\udcff"):
        pass
    assert not list(tmp_path.iterdir())
