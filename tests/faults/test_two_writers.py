"""One run folder, one writer: locks, fencing where locks do not reach, and clocks that jump."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import ExitCode
from finetune.pipeline import run as job_main
from finetune.runs import claim as claim_module
from finetune.runs.claim import locked
from finetune.runs.folder import Outcome, RunFolder
from finetune.training.trainer import Trainer
from tests.conftest import Cli

QUICK = ("--epochs", 3, "--batch-size", 8, "--workers", 0, "-s", "full")


def words_of(tiny: Path, data: Path, output: Path) -> list[object]:
    return ["run", "-b", tiny, "-d", data, "-o", output, *QUICK]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def after_epoch(monkeypatch: pytest.MonkeyPatch, number: int, action: Any) -> None:
    finish = Trainer._finish_epoch

    def finish_and_act(self: Trainer) -> None:
        finish(self)
        if self.progress.epoch == number:
            action()

    monkeypatch.setattr(Trainer, "_finish_epoch", finish_and_act)


HOLD = """
import sys, time
from pathlib import Path
from finetune.runs.claim import locked

with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_second_process_is_refused_and_the_first_is_unharmed(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim_module, "LOCK_WAIT", 0.1)
    output = tmp_path / "run"
    refused: list[subprocess.CompletedProcess[str]] = []

    def start_another() -> None:
        before = snapshot(output)
        code = "import finetune.runs.claim as c; c.LOCK_WAIT = 0.1; from finetune.cli.app import main; main()"
        command = [sys.executable, "-c", code, *map(str, words_of(tiny, image_folder, output))]
        refused.append(subprocess.run(command, capture_output=True, text=True, check=False))
        assert snapshot(output) == before

    with monkeypatch.context() as patch:
        after_epoch(patch, 1, start_another)
        assert cli(*words_of(tiny, image_folder, output)).exit_code == 0
    (second,) = refused
    assert second.returncode == ExitCode.USAGE == 2, second.stderr
    assert f"--output {output}: another process is working in it" in second.stderr
    assert cli(*words_of(tiny, image_folder, tmp_path / "alone")).exit_code == 0
    one, two = (tmp_path / name / "model" / "model.safetensors" for name in ("run", "alone"))
    assert one.read_bytes() == two.read_bytes()


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        assert not claim_module._try_lock(os.open(tmp_path, os.O_RDONLY), 0)
        process.send_signal(signal.SIGKILL)
    began = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - began < 1


def test_a_run_that_was_taken_over_writes_nothing_more(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locks do not reach over every network; the number of the attempt does."""
    output, seen = tmp_path / "run", {}

    def take_over() -> None:
        RunFolder(output).write_outcome(Outcome("running", "another process", attempt=2))
        seen.update(snapshot(output / "checkpoints"), outcome=(output / "outcome.json").read_bytes())

    with monkeypatch.context() as patch:
        after_epoch(patch, 1, take_over)
        result = cli(*words_of(tiny, image_folder, output))
    assert result.exit_code == ExitCode.USAGE == 2
    assert "another process has taken it over (attempt 2, and this is 1)" in result.stderr
    assert "Leave the run to that process." in result.stderr
    now = snapshot(output / "checkpoints") | {"outcome": (output / "outcome.json").read_bytes()}
    assert now == seen
    assert not (output / "model").exists() and not (output / "metrics.json").exists()


@pytest.mark.slow
def test_a_failure_does_not_overwrite_the_outcome_of_the_process_that_took_over(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"

    def take_over_and_fail(*_: Any) -> None:
        RunFolder(output).write_outcome(Outcome("running", "another process", attempt=2))
        raise ZeroDivisionError

    monkeypatch.setattr(job_main, "collect_metrics", take_over_and_fail)
    assert cli(*words_of(tiny, image_folder, output)).exit_code == ExitCode.INTERNAL
    assert json.loads((output / "outcome.json").read_text())["message"] == "another process"


@pytest.mark.slow
def test_a_finished_run_does_not_declare_done_what_another_process_took_over(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"

    def take_over(*_: Any) -> None:
        RunFolder(output).write_outcome(Outcome("running", "another process", attempt=2))

    monkeypatch.setattr(job_main, "report_result", take_over)
    result = cli(*words_of(tiny, image_folder, output))
    assert result.exit_code == ExitCode.USAGE, result.stderr
    assert json.loads((output / "outcome.json").read_text())["message"] == "another process"


@pytest.mark.slow
def test_a_clock_that_jumps_changes_neither_result_nor_seconds(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli(*words_of(tiny, image_folder, tmp_path / "calm")).exit_code == 0
    real, jumps = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: real() - 1e6 * (next(jumps) % 2))
    result = cli(*words_of(tiny, image_folder, tmp_path / "jumpy"))
    assert result.exit_code == 0, result.output
    for name in ("model/model.safetensors", "predictions.csv"):
        assert (tmp_path / "calm" / name).read_bytes() == (tmp_path / "jumpy" / name).read_bytes()
    seconds = json.loads((tmp_path / "jumpy" / "metrics.json").read_text())["seconds"]
    assert all(0 <= value < 60 for value in seconds.values())
