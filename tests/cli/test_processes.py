"""Commands in several real processes, started by the command itself or by torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from finetune.cli.app import app
from finetune.system.watch import GRACE
from tests.conftest import Cli, draw_folder
from tests.faults.results import read_metrics
from tests.processes import free_port


def finetune(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "finetune", *words, **variables)


def run(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | variables,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    draw_folder(root / "train", {"red": 21, "blue": 20})
    draw_folder(root / "val", {"red": 9, "blue": 8})
    return root


def words_of(tiny: Path, data: Path, output: Path) -> list[object]:
    return ["run", "-b", tiny, "-d", data, "-o", output, "--batch-size", 8, "--epochs", 2, "--workers", 0]


@pytest.fixture(scope="module")
def one(tiny: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process, whose result does not depend on how images are batched."""
    output = tmp_path_factory.mktemp("one") / "run"
    result = CliRunner().invoke(app, [str(word) for word in [*words_of(tiny, data, output), "-s", "freeze"]])
    assert result.exit_code == 0, result.output
    return output


def assert_same_metrics(one: Path, two: Path) -> None:
    left, right = read_metrics(one), read_metrics(two)
    assert left["accuracy"] == right["accuracy"]
    assert left["loss"] == pytest.approx(right["loss"], abs=1e-4)
    assert (one / "predictions.csv").read_text().count("\n") == (two / "predictions.csv").read_text().count(
        "\n"
    )


@pytest.mark.slow
def test_a_run_in_two_processes(tiny: Path, data: Path, one: Path, tmp_path: Path) -> None:
    done = finetune(
        *words_of(tiny, data, tmp_path / "two"),
        *("-s", "freeze", "--processes", 2, "--json"),
        FINETUNE_STALL_TIMEOUT="60",
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )
    assert done.returncode == 0, done.stderr
    assert_same_metrics(one, tmp_path / "two")
    assert done.stdout.count("\n") == 1 and '"accuracy"' in done.stdout
    assert done.stderr.count("features cached") == 1  # reported once
    assert "from an earlier run" not in done.stderr
    for noise in ("Warning", "torch.distributed", "Traceback", "[rank"):
        assert noise not in done.stderr


@pytest.mark.slow
def test_torchrun_starts_the_same_run(tiny: Path, data: Path, one: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    done = run(*words, "-m", "finetune", *words_of(tiny, data, tmp_path / "two"), "-s", "freeze")
    assert done.returncode == 0, done.stderr
    assert_same_metrics(one, tmp_path / "two")


@pytest.mark.slow
def test_an_error_is_reported_once_with_its_exit_code(tiny: Path, data: Path, tmp_path: Path) -> None:
    done = finetune(*words_of(tiny, tmp_path / "nowhere", tmp_path / "run"), "--processes", 2)
    assert done.returncode == 65, done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_features_and_predictions_are_the_same_bytes(
    cli: Cli, tiny: Path, data: Path, tmp_path: Path
) -> None:
    extract = ["extract", "-b", tiny, "-d", data, "--layers", "all"]
    assert cli(*extract, "-o", tmp_path / "one").exit_code == 0
    variables = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = finetune(*extract, "-o", tmp_path / "two", "--processes", 2, **variables)
    assert done.returncode == 0, done.stderr
    tables = sorted(path.name for path in (tmp_path / "one").glob("*.csv"))
    assert len(tables) > 2
    for name in tables:
        if name != "index.csv":
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name

    (data / "val" / "red" / "torn.jpg").write_bytes(b"no image")
    try:
        predict = ["predict", tiny, data / "val", "--batch-size", 4]
        assert cli(*predict, "-o", tmp_path / "one.csv").exit_code == 0
        done = finetune(*predict, "-o", tmp_path / "two.csv", "--processes", 2)
    finally:
        (data / "val" / "red" / "torn.jpg").unlink()
    assert done.returncode == 0, done.stderr
    for name in ("{}.csv", "{}.csv.bad.csv"):
        one, two = (tmp_path / name.format(word) for word in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", 1, "--processes", 1], "both set the number of processes"),
        (["--processes", 2, "--device", "cuda:0"], "its own GPU"),
        (["--gpus", 2, "--device", "cpu"], "its own GPU"),
        (["--processes", 0], "Error"),
    ],
)
def test_options_that_contradict_each_other(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, words: list[object], said: str
) -> None:
    done = cli("run", "-b", tiny, "-d", image_folder, "-o", tmp_path / "run", *words)
    assert done.exit_code == 2
    assert said in done.stderr


def test_missing_gpus_are_refused(cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path) -> None:
    done = cli("run", "-b", tiny, "-d", image_folder, "-o", tmp_path / "run", "--gpus", 64)
    assert done.exit_code == 78
    assert "--gpus 64: this machine shows" in done.stderr


def test_processes_under_a_launcher(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["run", "-b", tiny, "-d", image_folder, "-o", tmp_path / "run"]
    done = cli(*words, "--processes", 2)
    assert (done.exit_code, "has already started the processes of this job" in done.stderr) == (2, True)
    done = cli(*words, "--repeats", 2)
    assert (done.exit_code, "the processes of a single run" in done.stderr) == (2, True)
    assert cli("predict", tiny, "-", "-o", tmp_path / "x.csv", "--processes", 2).exit_code == 2


@pytest.mark.sample(1)
@pytest.mark.parametrize("leftover", [{"RANK": "1"}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_stale_variables_of_a_launcher_are_ignored(
    cli: Cli,
    tiny: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    leftover: dict[str, str],
) -> None:
    for name, value in leftover.items():
        monkeypatch.setenv(name, value)
    done = cli(*words_of(tiny, data, tmp_path / "run"), "-s", "freeze", "--json")
    assert done.exit_code == 0, done.stderr
    assert '"accuracy"' in done.stdout


def test_a_series_in_several_processes_needs_a_supervisor(
    cli: Cli, tiny: Path, data: Path, tmp_path: Path
) -> None:
    words = words_of(tiny, data, tmp_path / "run")
    done = cli(*words, "--repeats", 2, "--processes", 2, "--stall-timeout", 0)
    assert (done.exit_code, "have one process each" in done.stderr) == (2, True)


def test_a_stopped_process_does_not_end_the_list() -> None:
    """Its last result would look like the end of all results."""
    from finetune.errors import InterruptedRunError
    from finetune.evaluation.predict_files import _until_stopped
    from finetune.system.signals import StopSignal

    stop = StopSignal()
    answers = _until_stopped(iter(["one", "two"]), stop)  # type: ignore[arg-type]
    assert next(answers) == "one"
    stop.asked = True
    with pytest.raises(InterruptedRunError):
        next(answers)


@pytest.mark.slow
def test_standard_input_cannot_be_shared(tiny: Path, tmp_path: Path) -> None:
    done = finetune("predict", tiny, "-", "-o", tmp_path / "x.csv", "--processes", 2)
    assert done.returncode == 2, done.stderr
    assert "cannot share standard input" in done.stderr


BLOCKED = """
import ctypes, os, sys
from finetune.cli.output import handled_errors
from finetune.cli.processes import joined_processes

with handled_errors(True), joined_processes("cpu", 600, True) as distributed:
    distributed.wait()
    print("here", file=sys.stderr, flush=True)
    ctypes.CDLL(None).pause()  # as in a collective of NCCL: Python runs in no main thread
"""


@pytest.mark.slow
def test_a_process_blocked_in_c_ends_when_another_is_killed() -> None:
    """Without a launcher that would end it, as under srun and in Kubernetes."""
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    job |= {"LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    main, other = (
        subprocess.Popen(
            [sys.executable, "-c", BLOCKED],
            env=os.environ | job | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    )
    for process in (main, other):
        assert process.stderr is not None and process.stderr.readline() == "here\n"
    other.kill()
    began = time.monotonic()
    said, shown = main.communicate(timeout=60)
    other.communicate()
    assert time.monotonic() - began < GRACE + 10
    assert main.returncode == 75
    assert "error: process 1, the run: it has ended without saying why" in shown
    assert json.loads(said)["exit_code"] == 75
