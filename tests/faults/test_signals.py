"""Asked to stop at any moment, a run leaves with 75 and goes on to the same bits (promise R4)."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from PIL import Image

from finetune.cli.app import main
from finetune.cli.processes import leave
from finetune.data import decode
from finetune.errors import InterruptedRunError
from finetune.runs import resumable_writer
from finetune.runs.folder import RunFolder
from finetune.runs.reader import RunReader
from finetune.system.signals import ECHO
from tests.conftest import Cli, draw_folder
from tests.faults.crash import Crasher, open_crasher
from tests.faults.results import assert_same_run, fault_of
from tests.faults.test_kill_points import words_of
from tests.training.helpers import build_trainer


@pytest.fixture(scope="module")
def crasher() -> Iterator[Crasher]:
    with open_crasher() as crasher:
        yield crasher


@pytest.mark.slow
def test_sigterm_at_any_call_to_the_disk(crasher: Crasher, tiny: Path, tmp_path: Path) -> None:
    """In the middle of every save, of the export and of the tables, among others."""
    data = draw_folder(tmp_path / "data", {"red": 8, "blue": 8})
    whole = tmp_path / "whole"
    calls = crasher.run(*words_of(tiny, data, whole)).calls
    codes = []
    for number in range(0, len(calls), 3):
        output = tmp_path / str(number)
        end = crasher.run(*words_of(tiny, data, output), kill=number, number=signal.SIGTERM)
        assert end.code in {0, 75}, f"{number} {calls[number]}: {end.said}"
        assert "Traceback" not in end.said
        assert fault_of(output) == ""
        if end.code == 75:
            assert "same command again" in end.said
        assert crasher.run(*words_of(tiny, data, output)).code == 0
        assert_same_run(whole, output)
        codes.append(end.code)
    assert codes.count(75) > 0.8 * len(codes)


@pytest.mark.sample(1)
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_stop_in_the_middle_of_a_validation(
    image_folder: Path, tmp_path: Path, ema_decay: float | None
) -> None:
    """It does not wait for the end of the validation, which may outlast the grace time."""
    settings: dict[str, Any] = {"epochs": 3, "batch_size": 8, "lr": 0.05, "ema_decay": ema_decay}
    whole = build_trainer(image_folder, tmp_path / "whole", **settings)
    whole.fit()
    first = build_trainer(image_folder, tmp_path / "parts", **settings)
    validated = 0

    def stop_asked() -> bool:
        nonlocal validated
        validated += sys._getframe(2).f_code.co_name == "on_batch"  # which asks all processes
        return validated == 5  # the second batch of the second validation

    first.stop_asked = stop_asked
    with pytest.raises(InterruptedRunError):
        first.fit()
    assert (first.progress.epoch, first.progress.batch) == (1, 5)
    second = build_trainer(image_folder, tmp_path / "parts", **settings)
    second.fit()
    assert all(
        tensor.equal(second.eval_network.state_dict()[name])
        for name, tensor in whole.eval_network.state_dict().items()
    )


def start_run(tiny: Path, data: Path, output: Path, **variables: str) -> subprocess.Popen[str]:
    words = ["run", "-b", tiny, "-d", data, "-o", output, "-s", "full", "--epochs", 40]
    words += ["--batch-size", 4, "--workers", 1]
    return subprocess.Popen(
        [sys.executable, "-m", "finetune", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | variables,
    )


def wait_for_line(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)


def workers_of(pid: int) -> list[int]:
    """Decoding processes of a supervised run: grandchildren of the parent."""
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(word) for word in Path(f"/proc/{child}/task/{child}/children").read_text().split()]


@pytest.mark.slow
def test_a_supervised_run_saves_and_leaves(tiny: Path, tmp_path: Path) -> None:
    data, output = draw_folder(tmp_path / "data", {"red": 60, "blue": 60}), tmp_path / "run"
    process = start_run(tiny, data, output, FINETUNE_STALL_TIMEOUT="60")
    wait_for_line(output / "history.csv", process)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    outcome = RunReader(RunFolder(output)).outcome
    assert (outcome["state"], outcome["class"], outcome["retryable"]) == ("interrupted", "interrupted", True)
    (newest,) = [max((output / "checkpoints").iterdir())]
    assert json.loads((newest / "manifest.json").read_text())["step"] == outcome["step"] > 0


@pytest.mark.slow
def test_a_stopped_decoding_process_is_no_hang_for_ever(tiny: Path, tmp_path: Path) -> None:
    """DataLoader's own time limit cannot end this: the trainer itself never comes back."""
    data, output = draw_folder(tmp_path / "data", {"red": 60, "blue": 60}), tmp_path / "run"
    process = start_run(tiny, data, output, FINETUNE_STALL_TIMEOUT="15")
    wait_for_line(output / "history.csv", process)
    os.kill(workers_of(process.pid)[0], signal.SIGSTOP)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "no heartbeat for 15 s" in said
    outcome = RunReader(RunFolder(output)).outcome
    assert (outcome["state"], outcome["attempt"]) == ("done", 2)


# --- while a decoder is busy, which hears of no signal ---------------------------------------------

SLOW = "003.jpg"


def decode_for_ever(words: list[str], said: Path, reached: Any, where: str) -> None:
    """Run the command line; decoding one image takes minutes, in a thread or in a decoding process."""
    identified, own = decode._identified, os.getpid()

    def slowly(file: BinaryIO, name: str) -> Image.Image:
        if name == SLOW and (os.getpid() == own) == (where == "thread"):
            reached.set()
            time.sleep(600)
        return identified(file, name)

    decode._identified = slowly
    resumable_writer.SAVE_SECONDS = 0.0
    sys.stderr = said.open("w", encoding="utf-8", buffering=1)  # that of pytest is a file of its own
    sys.argv = ["finetune", *words]
    main()


@contextmanager
def decoding(tmp_path: Path, *words: object, where: str = "thread") -> Iterator[BaseProcess]:
    """A process, forked from this one, that runs the command line and decodes the slow image by now."""
    fork = multiprocessing.get_context("fork")
    reached = fork.Event()
    arguments = ([str(word) for word in words], tmp_path / "said", reached, where)
    process = fork.Process(target=decode_for_ever, args=arguments)
    process.start()
    try:
        assert reached.wait(60), (tmp_path / "said").read_text()
        yield process
    finally:
        process.kill()


def send(process: BaseProcess, number: int) -> None:
    assert process.pid
    os.kill(process.pid, number)


@pytest.mark.sample(1)
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_wait_for_a_decoder(
    tiny: Path, tmp_path: Path, cli: Cli, second: int
) -> None:
    data, output = draw_folder(tmp_path / "data", {"red": 4, "blue": 4}), tmp_path / "out.csv"
    words = ["predict", tiny, data, "-o", output, "--batch-size", 2, "--workers", 1]
    with decoding(tmp_path, *words) as process:
        while not output.with_name(".out.csv.rows.part").stat().st_size:
            time.sleep(0.01)
        time.sleep(1)  # until it waits for the second batch; before that the first signal ends it
        send(process, signal.SIGTERM)
        process.join(1.5 * ECHO)
        assert process.is_alive()  # it would finish the batch
        send(process, second)
        process.join(10)
        assert process.exitcode == 75
    assert "what was saved is kept" in (tmp_path / "said").read_text()
    result = cli(*words)
    assert result.exit_code == 0 and "resuming after 2 images" in result.stderr
    cli(*words[:-6], "-o", tmp_path / "whole.csv", *words[-4:])
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()


TRAIN = ["--set", "cache=off", "-s", "full", "--epochs", 1, "--workers", 2]


@pytest.mark.sample(1)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("command", "where"),
    [("evaluate", "thread"), ("check", "thread"), ("run", "thread"), ("run", "process")],
    ids=["evaluate", "check", "run", "run, in a process"],
)
def test_no_command_waits_for_a_decoder(
    tiny: Path, tmp_path: Path, command: str, where: str, number: int
) -> None:
    """Where no step has to be finished, the first signal ends it."""
    data = draw_folder(tmp_path / "data", {"0": 6, "1": 6})
    model = {"evaluate": [tiny], "check": [], "run": ["-b", tiny, *TRAIN]}[command]
    with decoding(tmp_path, command, *model, "-d", data, "-o", tmp_path / "out", where=where) as process:
        send(process, number)
        process.join(10)
        assert process.exitcode == 75, (tmp_path / "said").read_text()
    assert "Give the same command again" in (tmp_path / "said").read_text()


def be_deaf() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


def leave_busy(started: Any) -> None:
    """Leave while a thread and a process are at work, which Python would join."""
    threading.Thread(target=time.sleep, args=(600,)).start()
    multiprocessing.get_context("fork").Process(target=be_deaf, daemon=True).start()
    started.set()
    leave(75)


def test_an_interrupted_command_joins_nobody() -> None:
    fork = multiprocessing.get_context("fork")
    started = fork.Event()
    process = fork.Process(target=leave_busy, args=(started,))
    process.start()
    assert started.wait(20)
    process.join(10)
    code = process.exitcode
    process.kill()
    assert code == 75
