"""A parent that watches: hangs are ended, crashes tried again, signals passed on (promises R4, R8 and R9)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.launch.supervisor import Supervisor
from finetune.runs.folder import RunFolder
from finetune.runs.reader import RunReader
from tests.sweeps import slow_except

CHILD = """
import os, signal, sys, time
from pathlib import Path
from finetune.system.heartbeat import Heartbeat, find_parent
from finetune.runs.folder import Outcome, RunFolder
from finetune.system.signals import end_with_parent

descriptor, parent = find_parent()
end_with_parent(parent)
heartbeat = Heartbeat(descriptor)
folder = Path({folder!r})
starts = folder / "starts"
number = len(starts.read_text().splitlines()) if starts.exists() else 0
with starts.open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")

def claim(attempt=1):
    heartbeat.send({{"folder": str(folder)}})
    RunFolder(folder).write_outcome(Outcome("running", "x", attempt=attempt))
    heartbeat.send({{"attempt": attempt}})

def step(number):
    heartbeat.step = number
    heartbeat.send({{"step": number}})

def kill(number):
    os.kill(os.getpid(), number)
    time.sleep(60)

{body}
"""
"""A process that behaves as ``finetune run`` does towards its parent, without torch."""


class Trial:
    """A supervisor over a script."""

    def __init__(self, folder: Path, body: str, **keys: Any) -> None:
        self.folder, self.lines = RunFolder(folder), list[str]()
        script = folder.parent / "child.py"
        folder.mkdir()
        script.write_text(CHILD.format(folder=str(folder), body=body))
        self.supervisor = Supervisor(
            keys.pop("arguments", ["run"]),
            keys.pop("stall_timeout", 30.0),
            self.lines.append,
            command=(sys.executable, str(script)),
            waits=keys.pop("waits", (0.0, 0.0, 0.0)),
            **keys,
        )

    def run(self) -> int:
        self.code, self.output = self.supervisor.run()
        return self.code

    @property
    def starts(self) -> list[str]:
        return (self.folder.path / "starts").read_text().splitlines()

    @property
    def outcome(self) -> dict[str, Any]:
        return dict(RunReader(self.folder, tolerant=True).outcome)


Start = Callable[..., Trial]


@pytest.fixture
def trial(tmp_path: Path) -> Start:
    return lambda body, **keys: Trial(tmp_path / "run", body, **keys)


@pytest.mark.sample(2)
@pytest.mark.parametrize("code", [0, 2, 65, 74, 75, 76, 78])
def test_an_end_that_the_child_chose_is_final(trial: Start, code: int) -> None:
    one = trial(f"claim(); print('figures'); sys.exit({code})", arguments=["run", "--epochs", "3"])
    assert one.run() == code
    assert one.starts == ["run --epochs 3"]
    assert one.output == b"figures\n"
    assert one.outcome["state"] == "running"  # the child writes its own


def test_an_unforeseen_error_is_tried_once_more(trial: Start) -> None:
    one = trial("claim(); sys.exit(70)")
    assert one.run() == 70
    assert len(one.starts) == 2


def test_a_retry_goes_on_in_the_same_folder_and_prints_once(trial: Start) -> None:
    one = trial("claim(); print(number); sys.exit(70 if number == 0 else 0)")
    assert one.run() == 0
    assert one.starts == ["run", f"run --output {one.folder.path}"]
    assert one.output == b"1\n"


def test_an_error_before_the_run_began_is_final(trial: Start) -> None:
    one = trial("sys.exit(70)")
    assert one.run() == 70
    assert len(one.starts) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "fault"), [(signal.SIGKILL, 137, "killed"), (signal.SIGSEGV, 70, "crashed")]
)
def test_a_crash_for_ever_is_given_up(trial: Start, number: int, code: int, fault: str) -> None:
    one = trial(f"claim(); kill({int(number)})", arguments=["run", "--json"])
    assert one.run() == code
    assert len(one.starts) == 4
    assert (one.outcome["class"], one.outcome["exit_code"], one.outcome["state"]) == (fault, code, "failed")
    assert one.outcome["retryable"]
    assert json.loads(one.output) == one.outcome
    assert signal.Signals(number).name in one.outcome["message"]


def test_a_crash_now_and_then_is_not_the_end_as_long_as_steps_are_made(trial: Start) -> None:
    one = trial("claim(); step(number + 1); kill(9) if number < 8 else sys.exit(0)")
    assert one.run() == 0
    assert len(one.starts) == 9


@pytest.mark.parametrize(
    "hang", slow_except(["time.sleep(60)"], ["time.sleep(60)", "os.kill(os.getpid(), signal.SIGSTOP)"])
)
def test_a_hang_is_ended_and_tried_again(trial: Start, hang: str) -> None:
    one = trial(f"claim(); step(3)\nif number == 0: {hang}", stall_timeout=1.0)
    began = time.monotonic()
    assert one.run() == 0
    assert time.monotonic() - began < 20
    assert len(one.starts) == 2
    assert "no heartbeat for 1 s" in one.lines[0]


@pytest.mark.slow
def test_a_hang_for_ever_is_given_up(trial: Start) -> None:
    one = trial("claim(); time.sleep(60)", stall_timeout=0.5)
    assert one.run() == 78
    assert len(one.starts) == 4
    assert (one.outcome["class"], one.outcome["attempt"]) == ("stalled", 1)


@pytest.mark.slow
def test_signs_of_life_are_heard(trial: Start) -> None:
    one = trial("claim()\nfor number in range(10): time.sleep(0.3); heartbeat.beat()", stall_timeout=1.5)
    assert one.run() == 0
    assert len(one.starts) == 1


@pytest.mark.slow
def test_a_silence_before_the_run_has_begun_is_no_hang(trial: Start) -> None:
    """A download may take its time; it has time limits of its own."""
    one = trial("time.sleep(2)", stall_timeout=0.5)
    assert one.run() == 0


def test_the_attempt_in_the_outcome_is_the_childs(trial: Start) -> None:
    one = trial("claim(5); step(7); kill(9)")
    one.run()
    assert (one.outcome["attempt"], one.outcome["step"]) == (5, 7)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "written", ['Outcome("done", "finished", attempt=1)', 'Outcome("running", "x", attempt=2)']
)
def test_an_outcome_that_is_not_the_childs_own_stays(trial: Start, written: str) -> None:
    """A finished run that is only looked at again, and one that another process has taken over."""
    one = trial(f"claim(); RunFolder(folder).write_outcome({written}); kill(9)")
    assert one.run() == 137
    assert one.outcome["state"] in {"done", "running"}


def test_words_that_nobody_reads_change_no_exit_code() -> None:
    """As in ``finetune run ... 2>&1 | head``: the reader has left before the end."""
    code = (
        "from finetune.cli.output import print_line, say; say('x' * 9); print_line('y'); raise SystemExit(7)"
    )
    script = f"import os, sys\nos.close(0)\n{code}"
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run([sys.executable, "-c", script], stdout=writing, stderr=writing, check=False)
    assert process.returncode == 7


# --- signals: the supervisor is a process of its own ------------------------------------------------

PARENT = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup
from pathlib import Path
from tests.faults.test_supervisor import Trial
trial = Trial(Path(sys.argv[1]), sys.argv[2], grace=float(sys.argv[3]), stall_timeout=float(sys.argv[4]))
print("started", flush=True)
code = trial.run()
print("\\n".join(trial.lines))
sys.exit(code)
"""
POLITE = """
def leave(*_):
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, leave)
claim()
while True: time.sleep(0.05); heartbeat.beat()
"""
SLOW = """
def save(*_):
    heartbeat.send({"saving": True})
    time.sleep(3)
    heartbeat.send({"saving": False})
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
claim()
while True: time.sleep(0.05); heartbeat.beat()
"""
DEAF = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
claim()
while True: time.sleep(0.05); heartbeat.beat()
"""


def start(folder: Path, body: str, grace: float = 20, stall: float = 30) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(folder), body, str(grace), str(stall)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    wait_for((folder / "starts").exists)
    time.sleep(0.5)  # the handler of the script is set after its first line is written
    return process


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize(
    "number", slow_except([signal.SIGTERM], [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
)
def test_a_signal_lets_the_child_save(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path / "run", POLITE)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75, errors
    assert len((tmp_path / "run" / "starts").read_text().splitlines()) == 1


@pytest.mark.slow
def test_a_child_that_does_not_leave_is_ended_after_the_grace_time(tmp_path: Path) -> None:
    process = start(tmp_path / "run", DEAF, grace=1.0)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75
    outcome = RunReader(RunFolder(tmp_path / "run")).outcome
    assert (outcome["state"], outcome["class"], outcome["exit_code"]) == ("interrupted", "interrupted", 75)


@pytest.mark.slow
def test_a_save_may_take_longer_than_the_grace_time(tmp_path: Path) -> None:
    process = start(tmp_path / "run", SLOW, grace=1.0)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert RunReader(RunFolder(tmp_path / "run")).outcome["state"] == "running"  # the child left by itself


@pytest.mark.slow
def test_a_second_signal_does_not_wait_for_the_grace_time(tmp_path: Path) -> None:
    process = start(tmp_path / "run", DEAF, grace=600)
    process.send_signal(signal.SIGTERM)
    time.sleep(1)  # within half a second it would be the same signal, as a batch system sends it to all
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75


def test_no_child_outlives_a_killed_parent(tmp_path: Path) -> None:
    process = start(tmp_path / "run", DEAF)
    (child,) = children_of(process.pid)
    process.kill()
    process.communicate()
    wait_for(lambda: is_gone(child), seconds=5)


@pytest.mark.slow
def test_a_pause_of_both_is_no_hang(tmp_path: Path) -> None:
    """Ctrl-Z and fg: the time in between does not count."""
    process = start(tmp_path / "run", POLITE, stall=2.0)
    (child,) = children_of(process.pid)
    process.send_signal(signal.SIGTSTP)
    wait_for(lambda: " T " in Path(f"/proc/{child}/stat").read_text())
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    wait_for(lambda: " T " not in Path(f"/proc/{child}/stat").read_text())
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=30)
    assert process.returncode == 75, errors
    assert "no heartbeat" not in said
