"""The store: two are kept, whole, and a name comes after its bytes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from finetune.errors import TakenOverError
from finetune.training.checkpoint import CheckpointStore
from tests.training.stores import BEST, EPOCH, MANIFEST, STATE, checkpoint, fill, leftovers, load, snapshot


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    assert fill(tmp_path, 1, 2, 3, 4).names() == ["checkpoint-000003", "checkpoint-000004"]
    assert load(tmp_path) == (4, [])


def test_a_new_store_counts_on_from_the_names_that_are_there(tmp_path: Path) -> None:
    fill(tmp_path, 1, 2)
    assert fill(tmp_path, 3).names() == ["checkpoint-000002", "checkpoint-000003"]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    fill(tmp_path, 1, 2)
    shutil.copytree(tmp_path / "checkpoint-000001", tmp_path / ".checkpoint-000003.part")
    shutil.copytree(tmp_path / "checkpoint-000001", tmp_path / ".checkpoint-000000.trash")
    (tmp_path / "checkpoint-000001" / "notes.txt").write_text("the user's")
    assert load(tmp_path) == (2, [])
    assert leftovers(tmp_path) != []  # reading changes nothing
    CheckpointStore(tmp_path).clean()
    assert leftovers(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000001", "checkpoint-000002"]
    assert (tmp_path / "checkpoint-000001" / "notes.txt").exists()


def test_an_unchanged_best_shares_no_byte_on_the_disk(tmp_path: Path) -> None:
    """One bad sector must not spoil both checkpoints."""
    store, best = CheckpointStore(tmp_path), snapshot(7, 0.5)
    store.save(checkpoint(1, best))
    store.save(checkpoint(2, best))
    one, two = (tmp_path / name / BEST for name in store.names())
    assert one.read_bytes() == two.read_bytes()
    assert not one.samefile(two)


def test_a_process_that_was_taken_over_writes_nothing(tmp_path: Path) -> None:
    fill(tmp_path, 1)

    def refuse() -> None:
        raise TakenOverError("--output", "another process has taken it over", "Leave it.")

    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(TakenOverError):
        CheckpointStore(tmp_path, 1, refuse).save(checkpoint(2))
    assert sorted(tmp_path.rglob("*")) == before


def test_every_byte_is_on_the_disk_before_a_name_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def note_flush(descriptor: int) -> None:
        done.append(f"flush {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def note_name(before: Path, after: Path) -> None:
        done.append(f"name {Path(after).name}")
        (rename if Path(before).is_dir() else replace)(before, after)

    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(os, "replace", note_name)
    monkeypatch.setattr(os, "rename", note_name)
    folder = tmp_path / "checkpoints"
    fill(folder, 1)
    part = ".checkpoint-000001.part"
    files = [
        line
        for name in (STATE, EPOCH, BEST, MANIFEST)
        for line in (f"flush .{name}.part", f"name {name}", f"flush {part}")
    ]
    assert done == [*files, "name checkpoint-000001", "flush checkpoints"]
