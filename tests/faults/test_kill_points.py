"""Killed at any call that changes the disk, a run ends in the same bits (promises R1 and R2)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from finetune.data.scan_cache import SETTLED_SECONDS
from tests.conftest import draw_folder
from tests.faults.crash import Crasher, When, open_crasher
from tests.faults.results import assert_same_run, fault_of

SHARDS = 4
SETTINGS = (
    "cache=off",  # every run makes the same calls; tests/training/test_kept.py breaks passes of the trunk off
    "training.ema_decay=0.9",
    "training.mixup=0.2",
    "training.patience=2",
    "training.schedule=plateau",
)


@pytest.fixture(scope="module")
def crasher() -> Iterator[Crasher]:
    with open_crasher() as crasher:
        yield crasher


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("few"), {"red": 8, "blue": 8})


def words_of(tiny: Path, data: Path, output: Path) -> list[object]:
    words: list[object] = ["run", "-b", tiny, "-d", data, "-o", output, "-s", "full", "--epochs", 2]
    words += ["--workers", 0, "--batch-size", 4, "--set", "strategy.norm=train"]
    return [*words, *(word for setting in SETTINGS for word in ("--set", setting))]


@pytest.fixture(scope="module")
def whole(crasher: Crasher, tiny: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed, with the calls that it made in ``calls.json`` beside it.

    Another one comes before it: the first look at images that have settled is kept, which is a call or two
    that no later run makes.
    """
    output = tmp_path_factory.mktemp("whole") / "run"
    time.sleep(SETTLED_SECONDS + 0.5)
    assert crasher.run(*words_of(tiny, few, output.parent / "before")).code == 0
    end = crasher.run(*words_of(tiny, few, output))
    assert end.code == 0, end.said
    (output.parent / "calls.json").write_text(json.dumps(end.calls))
    return output


def points(whole: Path) -> list[tuple[int, When]]:
    """Every call, and every flush of a file once more with half of it lost."""
    calls: list[str] = json.loads((whole.parent / "calls.json").read_text())
    assert len(calls) > 70
    assert {call.split()[0] for call in calls} >= {"fsync", "replace", "rename", "mkdir", "unlink", "rmdir"}
    torn = [number for number, call in enumerate(calls) if call.startswith("fsync .")]
    return [*((number, "before") for number in range(len(calls))), *((number, "torn") for number in torn)]


@pytest.mark.slow
def test_a_kill_leaves_no_trace(crasher: Crasher, tiny: Path, few: Path, whole: Path, tmp_path: Path) -> None:
    """In the middle of the run: before a file and a folder get their names, one goes, and half of a file."""
    calls = [call.split()[0] for call in json.loads((whole.parent / "calls.json").read_text())]
    chosen: list[tuple[int, When]] = []
    for kind in ("replace", "rename", "unlink"):
        numbers = [number for number, call in enumerate(calls) if call == kind]
        chosen.append((numbers[len(numbers) // 2], "before"))
    torn = [point for point in points(whole) if point[1] == "torn"]
    chosen.append(torn[len(torn) // 2])
    assert_kills_leave_no_trace(crasher, tiny, few, whole, tmp_path, chosen)


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_a_kill_at_any_call_leaves_no_trace(
    crasher: Crasher, tiny: Path, few: Path, whole: Path, tmp_path: Path, shard: int
) -> None:
    assert_kills_leave_no_trace(crasher, tiny, few, whole, tmp_path, points(whole)[shard::SHARDS])


def assert_kills_leave_no_trace(
    crasher: Crasher, tiny: Path, few: Path, whole: Path, tmp_path: Path, chosen: list[tuple[int, When]]
) -> None:
    faults = []
    for number, when in chosen:
        output = tmp_path / f"{number}-{when}"
        killed = crasher.run(*words_of(tiny, few, output), kill=number, when=when)
        assert killed.code == -9
        if fault := fault_of(output):
            faults.append(f"{number} {when}: {fault}")
        again = crasher.run(*words_of(tiny, few, output))
        assert again.code == 0, f"{number} {when}: {again.said}"
        assert_same_run(whole, output)
    assert faults == []


@pytest.mark.slow
def test_kills_one_after_another_leave_no_trace(
    crasher: Crasher, tiny: Path, few: Path, whole: Path, tmp_path: Path
) -> None:
    random, kills = Random(0), 0
    most = len(json.loads((whole.parent / "calls.json").read_text())) + 10  # or the last part never ends
    for trial in range(6):
        output = tmp_path / str(trial)
        while (end := crasher.run(*words_of(tiny, few, output), kill=random.randrange(most))).code == -9:
            kills += 1
        assert end.code == 0, end.said
        assert_same_run(whole, output)
    assert kills > 6
