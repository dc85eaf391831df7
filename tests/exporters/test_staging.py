"""A folder with its final name is complete, and concurrent writers do not mix their files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetune.errors import UsageError
from finetune.exporters.folder import STALE, staged_alone


def test_of_two_concurrent_writers_the_first_to_finish_wins(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(UsageError, match="another process has filled it"), staged_alone(folder) as one:
        (one / "file").write_text("one")
        with staged_alone(folder) as two:
            (two / "file").write_text("two")
    assert [(path.name, (path / "file").read_text()) for path in tmp_path.iterdir()] == [("out", "two")]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_folder_has_the_permissions_of_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        (tmp_path / "out").mkdir()
        with staged_alone(tmp_path / "out") as part:
            (part / "file").touch()
        assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask
    finally:
        os.umask(before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_failed_write_leaves_no_files(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), staged_alone(tmp_path / "out") as part:
        (part / "file").touch()
        raise error
    assert list(tmp_path.iterdir()) == []


def test_only_old_leftovers_of_the_same_name_are_removed(tmp_path: Path) -> None:
    old, young, other = (tmp_path / name for name in (".o[u]t.a.part", ".o[u]t.b.part", ".out.c.part"))
    for folder in (old, young, other):
        folder.mkdir()
    for folder in (old, other):
        then = folder.stat().st_mtime - STALE - 60
        os.utime(folder, (then, then))
    with staged_alone(tmp_path / "o[u]t"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"o[u]t", ".o[u]t.b.part", ".out.c.part"}
