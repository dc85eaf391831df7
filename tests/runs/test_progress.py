"""``progress.json``: replaced as a whole, about once a second, and whatever happens to the disk."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from finetune.runs import progress as module
from finetune.runs.progress import ProgressFile
from finetune.system import display as displays
from finetune.system.display import SilentDisplay


def read(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(path.read_text())
    assert abs(facts.pop("time") - time.time()) < 60
    return facts


def test_facts_add_up_and_a_new_phase_is_written_at_once(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    file = ProgressFile(path)
    file.update({"phase": "training", "done": 0})
    file.update({"done": 7})  # too soon: the file has the version before
    assert read(path) == {"phase": "training", "done": 0}
    file.update({"phase": "computing the metrics", "metrics": {"loss": float("nan"), "epoch": 3}})
    expected = {"phase": "computing the metrics", "done": 7, "metrics": {"loss": None, "epoch": 3}}
    assert read(path) == expected and [one.name for one in tmp_path.iterdir()] == [path.name]


def test_a_version_is_written_when_the_last_one_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "INTERVAL", 0.0)
    file = ProgressFile(tmp_path / "progress.json")
    for done in range(3):
        file.update({"done": done})
        assert read(tmp_path / "progress.json") == {"done": done}


def test_no_disk_no_error(tmp_path: Path) -> None:
    ProgressFile(tmp_path / "gone" / "progress.json").update({"phase": "x"})
    assert not (tmp_path / "gone").exists()


def test_a_reader_never_sees_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INTERVAL", 0.0)
    path = tmp_path / "progress.json"
    file = ProgressFile(path)
    file.update({"text": ""})
    with ThreadPoolExecutor(3) as pool:
        writers = [
            pool.submit(lambda: [file.update({"text": "x" * number}) for number in range(300)])
            for _ in range(3)
        ]
        while not all(writer.done() for writer in writers):
            assert set(read(path)["text"]) <= {"x"}
        for writer in writers:
            writer.result()


def test_bars_tell_those_who_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(displays, "LOOK", 0.02)
    display, seen = SilentDisplay(), list[dict[str, Any]]()
    display.follow(seen.append)
    with display.track("decoding", 10) as advance:
        advance(4, "")
        time.sleep(0.2)
        advance(6, "")
    assert seen[0] == {"phase": "decoding", "done": 0, "total": 10, "seconds_left": None}
    assert any(facts["done"] == 4 and facts["total"] == 10 for facts in seen)
    with display.busy("loading"):
        pass
    assert seen[-1] == {"phase": "loading", "done": None, "total": None, "seconds_left": None}
