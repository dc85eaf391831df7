from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest

from finetune.cache.blocks import BlockFile, journal_of
from finetune.cache.shelf import Shelf, cache_folder


def keep(shelf: Shelf, name: str, num_bytes: int, used: float) -> Path:
    facts = {"kind": "test", "name": name}
    path = shelf.place(facts)
    file = BlockFile(path, facts, 1)
    file.append(bytes(num_bytes))
    file.close()
    os.utime(journal_of(path), (used, used))
    return path


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(1000, tmp_path)


def test_the_place_depends_on_every_fact(shelf: Shelf) -> None:
    facts = {"kind": "test", "weights": "a", "images": 3}
    assert shelf.place(facts) == shelf.place(dict(reversed(facts.items())))
    assert len({shelf.place(facts | {key: "other"}) for key in ("weights", "images")}) == 2
    assert shelf.place(facts).name.startswith("test-")


def test_the_longest_unused_makes_room(shelf: Shelf) -> None:
    old, new = keep(shelf, "old", 300, used=1), keep(shelf, "new", 300, used=2)
    shelf.make_room(400)
    assert old.exists() and new.exists()
    shelf.make_room(500)
    assert not old.exists() and new.exists()
    assert [kept.facts["name"] for kept in shelf.list()] == ["new"]


def test_what_is_in_use_stays(shelf: Shelf) -> None:
    old = keep(shelf, "old", 300, used=1)
    new = keep(shelf, "new", 300, used=2)
    reader = BlockFile(old, {"kind": "test", "name": "old"}, 1)
    os.utime(journal_of(old), (1, 1))
    shelf.make_room(600)
    assert old.exists() and not new.exists()
    assert shelf.clear() == (0, 0)
    reader.close()
    assert shelf.clear() == (1, 300)
    assert not list(shelf.folder.iterdir())


def test_limits_are_said(shelf: Shelf) -> None:
    assert shelf.find_obstacle(1000) == ""
    assert "max_gb" in shelf.find_obstacle(1001)
    with mock.patch("finetune.cache.shelf.free_bytes", return_value=2**30 + 400):
        assert shelf.find_obstacle(400) == ""
        assert "free" in shelf.find_obstacle(401)
        keep(shelf, "old", 300, used=1)
        assert shelf.find_obstacle(700) == ""
        assert "free" in shelf.find_obstacle(701)


def test_bytes_without_a_journal_are_cleared(shelf: Shelf) -> None:
    leftover = shelf.folder / "trunk-1.bin"
    leftover.write_bytes(b"x")
    shelf.clear()
    assert not leftover.exists()


def test_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder("kept") == Path("/somewhere/finetune/kept")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder("kept") == Path("/home/me/.cache/finetune/kept")


def test_another_users_cache_is_an_empty_one(shelf: Shelf) -> None:
    with mock.patch("pathlib.Path.glob", side_effect=PermissionError):
        assert shelf.list() == []
        assert shelf.clear() == (0, 0)
        shelf.make_room(100)


def test_what_is_in_use_counts(shelf: Shelf) -> None:
    path = keep(shelf, "old", 600, used=1)
    assert shelf.find_obstacle(900) == ""
    reader = BlockFile(path, {"kind": "test", "name": "old"}, 1)
    assert "max_gb" in shelf.find_obstacle(900)
    assert shelf.find_obstacle(400) == ""
    reader.close()
