"""The image's health check, on this program's own watching process and a child that falls silent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # the image's own script belongs to no package

from deploy import health

PROC = Path("/proc")
WATCH = """
import sys
from finetune.launch.supervisor import Supervisor
Supervisor([], 600, print, command=[sys.executable, "-c", sys.argv[1]]).run()
"""
WORK = """
import time
from finetune.system.heartbeat import Heartbeat, find_parent
heartbeat = Heartbeat(find_parent()[0])
print("working", flush=True)
while True:
    heartbeat.beat()
    time.sleep(0.1)
"""


@pytest.fixture
def watcher() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", WATCH, WORK], stdout=subprocess.DEVNULL)
    try:
        wait_for_child(process.pid)
        yield process
    finally:
        left = children_of(process.pid)
        process.kill()
        for child in left:
            os.kill(child, signal.SIGKILL)
        process.wait(timeout=30)


def children_of(number: int) -> list[int]:
    return [int(word) for word in (PROC / f"{number}/task/{number}/children").read_text().split()]


def wait_for_child(number: int) -> None:
    deadline = time.monotonic() + 20
    while number not in health.find_watchers(PROC):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_silent(watcher: subprocess.Popen[bytes], seconds: float) -> bool:
    """Other tests' jobs may be at work beside this one."""
    return watcher.pid in health.find_silent(PROC, seconds)


def test_a_job_that_works_is_well(watcher: subprocess.Popen[bytes]) -> None:
    assert not is_silent(watcher, 20)


@pytest.mark.slow
def test_a_job_that_was_stopped_is_not_and_then_is_again(watcher: subprocess.Popen[bytes]) -> None:
    assert not is_silent(watcher, 20)
    os.kill(children_of(watcher.pid)[0], signal.SIGSTOP)
    time.sleep(0.5)  # what it had sent is read
    assert is_silent(watcher, 2)
    os.kill(children_of(watcher.pid)[0], signal.SIGCONT)
    assert not is_silent(watcher, 20)


def test_a_stopped_watcher_is_silent_too(watcher: subprocess.Popen[bytes]) -> None:
    watcher.send_signal(signal.SIGSTOP)
    try:
        assert is_silent(watcher, 1)
    finally:
        watcher.send_signal(signal.SIGCONT)


def processes(folder: Path, **environments: bytes) -> Path:
    for name, environment in environments.items():
        (folder / name.removeprefix("p")).mkdir()
        (folder / name.removeprefix("p") / "environ").write_bytes(environment)
    return folder


def test_of_watchers_in_a_row_the_outermost_counts(tmp_path: Path) -> None:
    """With --gpus N the launcher stands in between, and hears nothing itself."""
    launcher, rank = b"A=1\0FINETUNE_PULSE=7:1\0", b"FINETUNE_PULSE=/proc/20/fd/7:20\0B=2\0"
    folder = processes(tmp_path, p1=b"PATH=/bin\0", p20=launcher, p30=rank, p31=rank)
    assert health.find_watchers(folder) == {1}


def test_where_nobody_watches_all_is_well(tmp_path: Path) -> None:
    folder = processes(tmp_path, p1=b"PATH=/bin\0", p9=b"NOT_FINETUNE_PULSE=7:1\0")
    assert health.find_silent(folder, 0) == set()


def test_a_watcher_that_has_ended_is_no_silent_one(tmp_path: Path) -> None:
    assert health.find_silent(processes(tmp_path, p20=b"FINETUNE_PULSE=7:1\0"), 0) == set()


@pytest.mark.parametrize(("silent", "code"), [(set(), 0), ({7}, 1)])
def test_the_answer_is_an_exit_code(monkeypatch: pytest.MonkeyPatch, silent: set[int], code: int) -> None:
    monkeypatch.setattr(health, "find_silent", lambda processes, seconds: silent)
    assert health.main() == code


def test_the_check_needs_nothing_that_is_installed() -> None:
    words = [sys.executable, "-IS", "-c", f"import runpy; runpy.run_path({health.__file__!r})"]
    subprocess.run(words, check=True, timeout=60)
