"""Promise R2: a run folder holds no checkpoint, or one that verifies; never half a file under a final name.

Files are damaged, disks fill up at every call that writes, and training goes on to the same bits.
"""

from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import DataError, DiskError, ExitCode
from finetune.training.checkpoint import CheckpointStore
from finetune.training.state import Checkpoint, Progress, Snapshot
from tests.sweeps import slow_except
from tests.training.helpers import assert_same_end, build_trainer, corrupt, fit_until, saved, warnings
from tests.training.stores import (
    BEST,
    EPOCH,
    MANIFEST,
    STATE,
    checkpoint,
    fill,
    leftovers,
    load,
    snapshot,
    verifies,
)

# --- damage --------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def lose_last_byte(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip_bit(path: Path, place: float = 0.9, bit: int = 3) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1 << bit
    path.write_bytes(content)


def zero_tail(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def empty(path: Path) -> None:
    os.truncate(path, 0)


DAMAGES = (truncate, lose_last_byte, flip_bit, zero_tail, empty, Path.unlink)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", [STATE, EPOCH, BEST])
def test_the_one_before_a_damaged_one_is_used(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    fill(tmp_path, 1, 2)
    damage(tmp_path / "checkpoint-000002" / name)
    step, said = load(tmp_path)
    assert step == 1
    assert len(said) == 1
    assert f"checkpoint-000002: {name} " in said[0]


LINES: tuple[Any, ...] = (None, {}, {"bytes": 1}, {"sha256": "0"}, [], "bytes sha256")


NO_MANIFESTS = (
    *("", "[]", "null", "7", "{}", '{"files": 1}', '{"files": []}', '{"files": "state"}', '{"files": {}}'),
    *("\udcff", "[" * 10**5, '{"files": {'),
    *(json.dumps({"files": {STATE: line}}) for line in LINES),
)


@pytest.mark.parametrize("content", NO_MANIFESTS, ids=lambda content: ascii(content[:30]))
def test_a_manifest_that_is_none_is_passed_over(tmp_path: Path, content: str) -> None:
    fill(tmp_path, 1, 2)
    (tmp_path / "checkpoint-000002" / MANIFEST).write_bytes(content.encode(errors="surrogateescape"))
    step, said = load(tmp_path)
    assert (step, len(said)) == (1, 1)
    assert "checkpoint-000002: its manifest.json is damaged" in said[0]


def test_a_manifest_that_is_gone_is_named(tmp_path: Path) -> None:
    fill(tmp_path, 1, 2)
    (tmp_path / "checkpoint-000002" / MANIFEST).unlink()
    assert load(tmp_path) == (
        1,
        ["skipping a damaged checkpoint: checkpoint-000002: its manifest.json is missing"],
    )


@pytest.mark.parametrize("name", [STATE, EPOCH, BEST, MANIFEST])
def test_no_flipped_bit_changes_what_is_read(tmp_path: Path, name: str) -> None:
    """A bit in the manifest may stand where nothing depends on it: then the content is the same."""
    fill(tmp_path, 1, 2)
    path = tmp_path / "checkpoint-000002" / name
    whole, draw = path.read_bytes(), random.Random(0)
    for place in range(0, len(whole), 1 if name == MANIFEST else 17):
        content = bytearray(whole)
        content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        step, said = load(tmp_path)
        assert (step, len(said)) == (1, 1) or (name == MANIFEST and step == 2), place


def test_when_all_are_damaged_every_reason_is_given_and_nothing_is_lost(tmp_path: Path) -> None:
    fill(tmp_path, 1, 2)
    flip_bit(tmp_path / "checkpoint-000001" / STATE)
    (tmp_path / "checkpoint-000002" / MANIFEST).unlink()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError) as refused:
        load(tmp_path)
    assert refused.value.exit_code == ExitCode.DATA == 65
    assert "checkpoint-000002: its manifest.json is missing" in refused.value.found
    assert "checkpoint-000001: state.safetensors has changed" in refused.value.found
    assert sorted(tmp_path.rglob("*")) == before


def test_a_state_of_another_version_says_so(tmp_path: Path) -> None:
    class Later(Progress):
        def to_json(self) -> str:
            return json.dumps(json.loads(super().to_json()) | {"momentum_of_time": 3})

    CheckpointStore(tmp_path).save(
        Checkpoint(Snapshot(snapshot(1).tensors, Later(step=1)), snapshot(1, 0.25), None)
    )
    with pytest.raises(DataError, match=r"state\.safetensors .*momentum_of_time\); another version"):
        load(tmp_path)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("name", "damage"), [(STATE, flip_bit), (EPOCH, truncate), (BEST, Path.unlink), (MANIFEST, empty)]
)
def test_training_goes_on_from_the_one_before_to_the_same_bits(
    image_folder: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    settings: dict[str, Any] = {"epochs": 3, "batch_size": 8, "lr": 0.05, "dropout": 0.2, "ema_decay": 0.9}
    build_trainer(image_folder, tmp_path / "whole", **settings).fit()
    # 5 steps an epoch: both inside the second, where there is a best
    fit_until(build_trainer(image_folder, tmp_path / "parts", **settings), lambda at: at.step >= 7)
    fit_until(build_trainer(image_folder, tmp_path / "parts", **settings), lambda at: at.step >= 8)
    store = CheckpointStore(tmp_path / "parts" / "checkpoints")
    damage(store.folder / store.names()[-1] / name)
    last = build_trainer(image_folder, tmp_path / "parts", **settings)
    assert [name in said for said in warnings(last)] == [True]
    last.fit()
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


PLACES: dict[str, Callable[[Progress], bool]] = {
    "inside the first epoch": lambda at: at.step >= 3,
    "at its end": lambda at: at.step >= 5,
    "between the two": lambda at: at.epoch >= 1,
    "inside the second epoch": lambda at: at.step >= 7,
    "after one way back": lambda at: at.rollbacks == 1 and at.step >= 7,
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("place", slow_except(["between the two", "after one way back"], PLACES))
def test_a_way_back_leads_to_the_same_start_after_an_interruption(
    image_folder: Path, tmp_path: Path, optimizer: str, place: str
) -> None:
    """Two ways back to the start of the second epoch: no step may have moved what is kept of it."""
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 0.05, "ema_decay": 0.9}
    settings |= {"optimizer": optimizer}
    settings |= {"trainer_type": corrupt(lambda at: at.rollbacks < 2 and at.step in (6, 7, 8, 9))}
    build_trainer(image_folder, tmp_path / "whole", **settings).fit()
    fit_until(build_trainer(image_folder, tmp_path / "parts", **settings), PLACES[place])
    found = saved(tmp_path / "parts")
    assert (found.now is found.epoch_start) == (place == "between the two")
    last = build_trainer(image_folder, tmp_path / "parts", **settings)
    assert last.fit().rollbacks == 2
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


# --- a disk that fails ---------------------------------------------------------------------------


class FailingDisk:
    """Lets the calls that change the disk fail with ENOSPC: one of them, or that one and all after it."""

    CALLS = ((os, "mkdir"), (os, "fsync"), (os, "replace"), (os, "rename"), (Path, "open"))

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.failed = False
        self._left, self._for_ever = -1, False
        for owner, name in self.CALLS:
            patch.setattr(owner, name, self._failing(getattr(owner, name)))

    @contextmanager
    def fail_at(self, number: int, for_ever: bool) -> Iterator[None]:
        self.failed, self._left, self._for_ever = False, number, for_ever
        yield
        self._left, self._for_ever = -1, False

    def _failing(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*args: Any, **kwargs: Any) -> Any:
            self._left -= 1
            if self._left == -1 or (self._for_ever and self._left < -1):
                self.failed = True
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(*args, **kwargs)

        return failing


def try_to_save(store: CheckpointStore, step: int) -> bool:
    try:
        store.save(checkpoint(step))
    except DiskError as error:
        assert error.exit_code == ExitCode.DISK == 74
        return False
    return True


@pytest.mark.sample(1)
@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize("earlier", [1, 2])
def test_a_disk_that_fails_at_any_call_leaves_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: int, for_ever: bool
) -> None:
    """Once: two that are there leave room for another try. For ever: nothing helps, and nothing is lost."""
    disk, refused = FailingDisk(monkeypatch), 0
    for number in range(100):
        folder = tmp_path / str(number)
        store = fill(folder, *range(1, earlier + 1))
        with disk.fail_at(number, for_ever):
            saved = try_to_save(store, 9)
        assert leftovers(folder) == [] or saved  # a name that could not be removed is no harm
        assert all(verifies(folder / name, tmp_path / "aside") for name in store.names())
        assert saved or f"checkpoint-00000{earlier}" in store.names()
        assert load(folder)[0] in ([9] if saved else [earlier, 9])
        refused += not saved
        if not disk.failed:
            break
    assert number >= 19  # a folder, four files of four calls, a name, the folder above; a name that goes
    assert refused == (0 if earlier == 2 and not for_ever else 19)


class SmallDisk:
    """A disk that holds so many bytes: what is beyond is refused when it is flushed, as many disks do."""

    def __init__(self, patch: pytest.MonkeyPatch, root: Path, capacity: float) -> None:
        self.root, self.capacity, self._fsync = root, capacity, os.fsync
        patch.setattr(os, "fsync", self._flush)

    def _flush(self, descriptor: int) -> None:
        if used_bytes(self.root) > self.capacity:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._fsync(descriptor)


def used_bytes(root: Path) -> int:
    files = {path.stat().st_ino: path.stat().st_size for path in root.rglob("*") if path.is_file()}
    return sum(files.values())


def test_a_full_disk_has_room_for_the_newest_instead_of_the_oldest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fill(tmp_path, 1, 2)
    SmallDisk(monkeypatch, tmp_path, 1.2 * used_bytes(tmp_path))
    store.save(checkpoint(3))
    assert store.names() == ["checkpoint-000002", "checkpoint-000003"]
    assert load(tmp_path) == (3, [])


def test_on_a_disk_that_stays_full_the_newest_is_never_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fill(tmp_path, 1, 2)
    SmallDisk(monkeypatch, tmp_path, 0.6 * used_bytes(tmp_path))
    for step in (3, 4, 5):
        assert not try_to_save(store, step)
        assert store.names() == ["checkpoint-000002"]
        assert load(tmp_path) == (2, [])


def test_a_full_disk_costs_the_damaged_one_before_the_one_that_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, 1, 2)
    truncate(tmp_path / "checkpoint-000002" / STATE)
    store = CheckpointStore(tmp_path)
    assert store.load() is not None
    disk = SmallDisk(monkeypatch, tmp_path, 0)
    assert not try_to_save(store, 3)
    assert store.names() == ["checkpoint-000001"]
    assert load(tmp_path) == (1, [])
    disk.capacity = 1e9
    assert try_to_save(store, 4)
    assert store.names() == ["checkpoint-000001", "checkpoint-000002"]


def test_the_damaged_one_makes_room_for_the_next(tmp_path: Path) -> None:
    fill(tmp_path, 1, 2)
    truncate(tmp_path / "checkpoint-000002" / STATE)
    store = CheckpointStore(tmp_path)
    assert store.load() is not None
    store.save(checkpoint(3))
    assert store.names() == ["checkpoint-000001", "checkpoint-000003"]
