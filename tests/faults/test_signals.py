"""Asked to stop at any moment, a run leaves with 75 and goes on to the same bits (promise R4)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import InterruptedRunError
from finetune.runs.folder import RunFolder
from finetune.runs.reader import RunReader
from tests.conftest import draw_folder
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
