"""Faults among several processes: none hangs, none is left over, and the run ends in the same bits (R10)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import draw_folder
from tests.faults.results import assert_same_run

pytestmark = pytest.mark.slow  # a run in two processes starts five interpreters


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("data"), {"red": 60, "blue": 60})


def start(tiny: Path, data: Path, output: Path, stall: int = 60) -> subprocess.Popen[str]:
    words = ["run", "-b", tiny, "-d", data, "-o", output, "-s", "full", "--epochs", 6, "--batch-size", 8]
    words += ["--workers", 1, "--processes", 2]
    return subprocess.Popen(
        [sys.executable, "-m", "finetune", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"FINETUNE_STALL_TIMEOUT": str(stall)},
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = process.communicate(timeout=200)
    return process.returncode, said


@pytest.fixture(scope="module")
def whole(tiny: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    code, said = finish(start(tiny, data, output))
    assert code == 0, said
    return output


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def processes_of(parent: subprocess.Popen[str]) -> tuple[int, list[int]]:
    """The launcher, and its processes by rank."""
    (launcher,) = children_of(parent.pid)
    ranks = {rank_of(pid): pid for pid in children_of(launcher)}
    return launcher, [ranks[rank] for rank in sorted(ranks)]


def rank_of(pid: int) -> int:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(int(one.partition(b"=")[2]) for one in variables if one.startswith(b"RANK="))


def wait_for(output: Path, process: subprocess.Popen[str]) -> None:
    """Wait for the second epoch."""
    deadline = time.monotonic() + 120
    history = output / "history.csv"
    while not history.exists() or history.read_text().count("\n") < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def assert_none_left(output: Path) -> None:
    """No process works on a run any more."""
    deadline = time.monotonic() + 10
    while left := [path.name for path in Path("/proc").glob("[0-9]*") if works_on(path, output)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def works_on(process: Path, output: Path) -> bool:
    try:
        return str(output).encode() in (process / "cmdline").read_bytes()
    except OSError:
        return False


Fault = Callable[[subprocess.Popen[str]], None]


def kill_rank(rank: int) -> Fault:
    return lambda parent: os.kill(processes_of(parent)[1][rank], signal.SIGKILL)


def kill_launcher(parent: subprocess.Popen[str]) -> None:
    os.kill(processes_of(parent)[0], signal.SIGKILL)


@pytest.mark.parametrize("fault", [kill_rank(0), kill_rank(1), kill_launcher], ids=["0", "1", "launcher"])
def test_a_killed_process_costs_a_start(
    tiny: Path, data: Path, whole: Path, tmp_path: Path, fault: Fault
) -> None:
    process = start(tiny, data, tmp_path / "run")
    wait_for(tmp_path / "run", process)
    fault(process)
    code, said = finish(process)
    assert code == 0, said
    assert "starting again" in said and "Traceback" not in said
    assert_same_run(whole, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["attempt"] == 2
    assert_none_left(tmp_path / "run")


@pytest.mark.parametrize("target", ["parent", "launcher", "rank"])
def test_sigterm_saves_and_leaves_with_75(
    tiny: Path, data: Path, whole: Path, tmp_path: Path, target: str
) -> None:
    process = start(tiny, data, tmp_path / "run")
    wait_for(tmp_path / "run", process)
    launcher, ranks = processes_of(process)
    os.kill({"parent": process.pid, "launcher": launcher, "rank": ranks[1]}[target], signal.SIGTERM)
    code, said = finish(process)
    assert "Traceback" not in said
    assert_none_left(tmp_path / "run")
    if target == "rank":  # nobody asked the run to stop: it goes on
        assert code in (0, 75), said
    else:
        assert code == 75, said
        outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
        assert (outcome["state"], outcome["exit_code"]) == ("interrupted", 75)
        assert outcome["step"] > 0
    if code == 75:
        code, said = finish(start(tiny, data, tmp_path / "run"))
        assert code == 0, said
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_process_is_no_hang(tiny: Path, data: Path, whole: Path, tmp_path: Path, rank: int) -> None:
    process = start(tiny, data, tmp_path / "run", stall=15)
    wait_for(tmp_path / "run", process)
    os.kill(processes_of(process)[1][rank], signal.SIGSTOP)
    code, said = finish(process)
    assert code == 0, said
    assert "starting again" in said
    assert_same_run(whole, tmp_path / "run")
    assert_none_left(tmp_path / "run")


def test_a_killed_parent_takes_all_with_it(tiny: Path, data: Path, whole: Path, tmp_path: Path) -> None:
    process = start(tiny, data, tmp_path / "run")
    wait_for(tmp_path / "run", process)
    process.kill()
    process.communicate()
    assert_none_left(tmp_path / "run")
    code, said = finish(start(tiny, data, tmp_path / "run"))
    assert code == 0, said
    assert_same_run(whole, tmp_path / "run")
