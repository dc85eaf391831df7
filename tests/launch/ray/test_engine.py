"""`--engine ray` where no cluster is needed: what is refused, and how the driver reads its messages."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.errors import EnvironmentFaultError, InterruptedRunError, UsageError
from finetune.launch.mailbox import LaunchSpec, Mailbox, Message, MessageKind
from finetune.launch.ray import _build_spec, _check_size, _Job, launch_on_ray
from tests.conftest import Cli


def test_a_number_of_processes_is_needed(cli: Cli) -> None:
    result = cli("run", "--data", "sample:digits", "--engine", "ray")
    assert result.exit_code == 2
    assert "Add --processes N, or --gpus N." in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--processes", 2, "--gpus", 2], "both set the number of processes"),
        (["--gpus", 2, "--device", "cpu"], "each process uses its own GPU"),
        (["--processes", 2, "--device", "cuda:1"], "each process uses its own GPU"),
    ],
)
def test_options_that_contradict_each_other(cli: Cli, words: list[object], said: str) -> None:
    result = cli("run", "--data", "sample:digits", "--engine", "ray", *words)
    assert (result.exit_code, said in result.stderr) == (2, True), result.stderr


def test_without_ray(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPUs of a cluster are not looked for on this machine, so that it is Ray that is missed."""
    monkeypatch.setitem(sys.modules, "ray", None)
    for words in (["--processes", 2], ["--gpus", 64]):
        result = cli("run", "--data", "sample:digits", "--engine", "ray", *words)
        assert result.exit_code == 78
        assert "pip install 'ray[train]'" in result.stderr


@pytest.mark.parametrize("address", ["http://10.0.0.1:8265", "ray://10.0.0.1:10001"])
def test_an_address_that_is_none_of_the_cluster(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UsageError, match="HOST:PORT"):
        launch_on_ray(["run"], 2, False, print)


def test_a_cluster_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens; Ray itself would go on trying for minutes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{probe.getsockname()[1]}")
        with pytest.raises(EnvironmentFaultError, match=r"RAY_ADDRESS=127\.0\.0\.1:\d+: .*refused"):
            launch_on_ray(["run"], 2, False, print)


def test_no_usage_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the user's environment says, and before Ray is imported."""
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    with pytest.raises(EnvironmentFaultError):
        launch_on_ray(["run"], 2, False, print)
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_a_cluster_that_is_too_small() -> None:
    ray = SimpleNamespace(cluster_resources=lambda: {"CPU": 4.0, "GPU": 1.0})
    _check_size(ray, 4, on_gpu=False)
    with pytest.raises(EnvironmentFaultError, match="--processes 5 --engine ray: the Ray cluster has 4 CPUs"):
        _check_size(ray, 5, on_gpu=False)
    with pytest.raises(EnvironmentFaultError, match="--gpus 2 --engine ray: the Ray cluster has 1 GPUs"):
        _check_size(ray, 2, on_gpu=True)


def test_what_the_processes_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Our own words only: a cluster belongs to others as well, and is not handed this user's secrets."""
    monkeypatch.chdir(tmp_path)
    for name in ("FINETUNE_DEBUG", "FINETUNE_PULSE", "FINETUNE_REPORT", "OMP_NUM_THREADS", "HF_TOKEN"):
        monkeypatch.setenv(name, "3")
    spec = _build_spec(["run", "--output", "x"])
    assert spec.arguments == ["run", "--output", "x"]
    assert Path(spec.folder) == tmp_path
    assert {"FINETUNE_DEBUG", "OMP_NUM_THREADS"} <= set(spec.environment)
    assert not {"FINETUNE_PULSE", "FINETUNE_REPORT", "HF_TOKEN"} & set(spec.environment)


def test_a_worker_that_cannot_take_part(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from finetune import __version__
    from finetune.launch.ray_worker import _find_error

    assert _find_error(LaunchSpec([], str(tmp_path), {}, __version__)) is None
    assert "does not see the working folder" in str(
        _find_error(LaunchSpec([], str(tmp_path / "absent"), {}, __version__))
    )
    assert "the command was started with 0.0.0" in str(
        _find_error(LaunchSpec([], str(tmp_path), {}, "0.0.0"))
    )


# --- messages -------------------------------------------------------------------------------------


class Local:
    """Ray's way to call an actor, here in one process."""

    def __init__(self, mailbox: Mailbox) -> None:
        self.collect = SimpleNamespace(remote=mailbox.collect)

    @staticmethod
    def get(value: Any) -> Any:
        return value


def read(*messages: Message, stops: int = 0) -> tuple[_Job, Mailbox]:
    mailbox = Mailbox()
    mailbox.post(messages)
    job = _Job(Local, Path(), [0.0] * stops)
    job._collect(Local(mailbox))
    return job, mailbox


def exits(*codes: int) -> list[Message]:
    return [Message(rank, MessageKind.EXIT, str(code).encode()) for rank, code in enumerate(codes)]


def started(*ranks: int) -> list[Message]:
    return [Message(rank, MessageKind.STARTED) for rank in ranks]


@pytest.fixture
def heartbeat(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What whoever watches over the run gets to read."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    monkeypatch.setenv("FINETUNE_PULSE", f"{writing}:1")

    def heard() -> bytes:
        try:
            return os.read(reading, 1 << 16)
        except BlockingIOError:
            return b""

    yield heard
    os.close(reading)
    os.close(writing)


def test_the_code_of_the_main_process_counts(heartbeat: Any) -> None:
    for codes in ((0, 0), (0, 1), (65, 75), (2, -9)):
        job, _ = read(*started(0, 1), *exits(*codes))
        assert job._conclude(2) == codes[0]
    assert heartbeat() == b""


def test_a_lost_process_is_told_apart_from_a_stop(heartbeat: Any) -> None:
    stopped, _ = read(*started(0, 1), *exits(75, 75), stops=1)
    assert (stopped._conclude(2), heartbeat()) == (75, b"")
    lost, _ = read(*started(0, 1), *exits(75, -9))
    assert (lost._conclude(2), heartbeat()) == (75, b'{"lost": true}\n')
    main, _ = read(*started(0, 1), *exits(-11, 75))
    assert main._conclude(2) == -signal.SIGSEGV
    machine, _ = read(*started(0, 1))
    assert (machine._conclude(2), heartbeat()) == (-signal.SIGKILL, b'{"lost": true}\n')


def test_a_machine_that_cannot_take_part_gives_its_code(heartbeat: Any) -> None:
    """The main process was asked to leave for its sake."""
    job, _ = read(*started(0, 1), Message(1, MessageKind.EXIT, b"78"), Message(0, MessageKind.EXIT, b"75"))
    assert (job._conclude(2), heartbeat()) == (78, b"")


def test_nothing_has_started() -> None:
    job, _ = read()
    job._ray_error = RuntimeError("No module named 'finetune'")
    with pytest.raises(EnvironmentFaultError, match="No module named 'finetune'"):
        job._conclude(2)


def test_the_others_end_with_the_first_that_fails() -> None:
    job, mailbox = read(*exits(0))
    job._collect(Local(mailbox))
    assert mailbox.post([]) == 0
    job, mailbox = read(Message(1, MessageKind.EXIT, b"70"))
    job._collect(Local(mailbox))
    assert mailbox.post([]) == 1


def test_signs_of_life_come_in_whole_lines(heartbeat: Any) -> None:
    parts = [b'{"step": 1}\n{"st', b'ep": 2}\n', b'{"step"']
    read(
        *[Message(0, MessageKind.HEARTBEAT, part) for part in parts],
        Message(1, MessageKind.HEARTBEAT, b'{"step": 9}\n'),
    )
    assert heartbeat() == b'{"step": 1}\n{"step": 2}\n'


def test_words_arrive_as_they_were_said(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    read(Message(0, MessageKind.STDOUT, b"{}\n"), Message(0, MessageKind.STDERR, "Größe\r".encode()))
    out, err = capfdbinary.readouterr()
    assert (out, err) == (b"{}\n", "Größe\r".encode())


def test_stopped_before_anything_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that waits in the cluster's queue leaves at once."""
    monkeypatch.setattr(_Job, "_train", lambda *_: time.sleep(2))
    job = _Job(_StillTraining(), Path(), [0.0])
    with pytest.raises(InterruptedRunError, match="before its processes had started"):
        job.run(LaunchSpec([], "", {}, ""), 2, False)


class _StillTraining:
    """As much of Ray as a run touches that gets no room."""

    def __init__(self) -> None:
        self.util = SimpleNamespace(
            scheduling_strategies=SimpleNamespace(NodeAffinitySchedulingStrategy=lambda *_, **__: None)
        )

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "node")

    def remote(self, mailbox: type[Mailbox]) -> Any:
        here = SimpleNamespace(remote=lambda: Local(mailbox()))
        return SimpleNamespace(options=lambda **_: here)

    @staticmethod
    def get(value: Any) -> Any:
        return value
