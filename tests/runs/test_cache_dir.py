from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest

from finetune.errors import DiskError
from finetune.runs.block_file import BlockFile, journal_of
from finetune.runs.cache_dir import FeatureCacheDir, cache_folder, make_once


def keep(cache_dir: FeatureCacheDir, name: str, num_bytes: int, used: float) -> Path:
    facts = {"kind": "test", "name": name}
    path = cache_dir.path_for(facts)
    file = BlockFile(path, facts, 1)
    file.append(bytes(num_bytes))
    file.close()
    os.utime(journal_of(path), (used, used))
    return path


@pytest.fixture
def cache_dir(tmp_path: Path) -> FeatureCacheDir:
    return FeatureCacheDir(1000, tmp_path)


def test_the_path_depends_on_every_fact(cache_dir: FeatureCacheDir) -> None:
    facts = {"kind": "test", "weights": "a", "images": 3}
    assert cache_dir.path_for(facts) == cache_dir.path_for(dict(reversed(facts.items())))
    assert len({cache_dir.path_for(facts | {key: "other"}) for key in ("weights", "images")}) == 2
    assert cache_dir.path_for(facts).name.startswith("test-")


def test_the_least_recently_used_file_is_removed_first(cache_dir: FeatureCacheDir) -> None:
    old, new = keep(cache_dir, "old", 300, used=1), keep(cache_dir, "new", 300, used=2)
    cache_dir.make_room(400)
    assert old.exists() and new.exists()
    cache_dir.make_room(500)
    assert not old.exists() and new.exists()
    assert [kept.facts["name"] for kept in cache_dir.list()] == ["new"]


def test_files_in_use_are_kept(cache_dir: FeatureCacheDir) -> None:
    old = keep(cache_dir, "old", 300, used=1)
    new = keep(cache_dir, "new", 300, used=2)
    reader = BlockFile(old, {"kind": "test", "name": "old"}, 1)
    os.utime(journal_of(old), (1, 1))
    cache_dir.make_room(600)
    assert old.exists() and not new.exists()
    assert cache_dir.clear() == (0, 0)
    reader.close()
    assert cache_dir.clear() == (1, 300)
    assert not list(cache_dir.folder.iterdir())


def test_limits_are_reported(cache_dir: FeatureCacheDir) -> None:
    assert cache_dir.find_obstacle(1000) == ""
    assert "max_gb" in cache_dir.find_obstacle(1001)
    with mock.patch("finetune.runs.cache_dir.free_bytes", return_value=2**30 + 400):
        assert cache_dir.find_obstacle(400) == ""
        assert "free" in cache_dir.find_obstacle(401)
        keep(cache_dir, "old", 300, used=1)
        assert cache_dir.find_obstacle(700) == ""
        assert "free" in cache_dir.find_obstacle(701)


def test_files_without_a_journal_are_removed(cache_dir: FeatureCacheDir) -> None:
    leftover = cache_dir.folder / "trunk-1.bin"
    leftover.write_bytes(b"x")
    cache_dir.clear()
    assert not leftover.exists()


def test_the_default_folder_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder("kept") == Path("/somewhere/finetune/kept")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder("kept") == Path("/home/me/.cache/finetune/kept")


def test_the_cache_of_another_user_reads_as_empty(cache_dir: FeatureCacheDir) -> None:
    with mock.patch("pathlib.Path.glob", side_effect=PermissionError):
        assert cache_dir.list() == []
        assert cache_dir.clear() == (0, 0)
        cache_dir.make_room(100)


def test_files_in_use_count_towards_the_limit(cache_dir: FeatureCacheDir) -> None:
    path = keep(cache_dir, "old", 600, used=1)
    assert cache_dir.find_obstacle(900) == ""
    reader = BlockFile(path, {"kind": "test", "name": "old"}, 1)
    assert "max_gb" in cache_dir.find_obstacle(900)
    assert cache_dir.find_obstacle(400) == ""
    reader.close()


def test_a_lock_is_not_opened_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would create, or lock, the file that a link of the lock's name leads to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cache_folder("archives")
    folder.mkdir(parents=True)
    (folder / "one.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(DiskError, match="it is a symbolic link"):
        make_once("archives", "one", lambda _: None)
    assert not (tmp_path / "victim").exists()
