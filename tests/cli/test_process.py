"""What needs a separate process: start-up, signals, pipes and kills."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import draw_folder
from tests.sweeps import slow_except


def start(*words: object, **keys: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "finetune", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **keys)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, {"GOMP_SPINCOUNT": "5000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_compute_threads_wait_briefly_unless_the_user_says_how(
    given: dict[str, str], kept: dict[str, str]
) -> None:
    """They are told before torch is imported: its OpenMP reads the variable then."""
    program = (
        "import os, sys\n"
        "from finetune.cli import app\n"
        "app.hosted.call = lambda _: print({key: os.environ[key] for key in os.environ if 'OMP_' in key}, "
        "'torch' in sys.modules)\n"
        "app.main()"
    )
    others = {key: value for key, value in os.environ.items() if "OMP_" not in key}
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=others | given
    )
    assert said.stdout.strip() == f"{kept} False"


def finish(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "finetune", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_imports_no_torch() -> None:
    code = "import sys\ntry:\n  from finetune.cli.app import main\n  main()\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'pydantic', 'pandas', 'timm', 'PIL', 'numpy'} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False
    )
    assert "run" in result.stdout
    assert result.stdout.splitlines()[-1] == "[]"


def test_version_and_module_agree() -> None:
    from finetune import __version__

    assert finish("--version").stdout.strip() == __version__


@pytest.fixture(scope="module")
def long_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("long"), {"red": 60, "blue": 60})


def words_of(tiny: Path, data: Path, output: Path) -> list[object]:
    settings = (
        "--workers",
        1,
        "--batch-size",
        4,
        "--epochs",
        6,
        "-s",
        "full",
        *("--set", "input.augmentation=medium", "--set", "strategy.norm=train"),
    )
    return ["run", "-b", tiny, "-d", data, "-o", output, *settings]


def wait_for(path: Path, process: subprocess.Popen[str], text: str = "", seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} did not come: {process.communicate()}")


@pytest.fixture(scope="module")
def uninterrupted(tiny: Path, long_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    command = [sys.executable, "-m", "finetune", *map(str, words_of(tiny, long_data, output)), "--json"]
    result = subprocess.run(command, capture_output=True, check=False)  # bytes: text would lose a "\r"
    assert result.returncode == 0, result.stderr
    (output.parent / "stdout").write_bytes(result.stdout)
    (output.parent / "stderr").write_bytes(result.stderr)
    return output


def assert_same_result(one: Path, two: Path) -> None:
    left, right = (load_file(run / "model" / "model.safetensors") for run in (one, two))
    assert [name for name in left if not left[name].equal(right[name])] == []
    assert (one / "predictions.csv").read_bytes() == (two / "predictions.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", slow_except([signal.SIGTERM], [signal.SIGINT, signal.SIGTERM]))
def test_a_stopped_run_resumes_to_the_same_bits(
    uninterrupted: Path, tiny: Path, long_data: Path, tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "run"
    process = start(*words_of(tiny, long_data, output), start_new_session=True)
    wait_for(output / "history.csv", process)
    os.killpg(process.pid, number)  # as a terminal does: to the decoding workers as well
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "Traceback" not in said
    words = shlex.join(map(str, words_of(tiny, long_data, output)))
    assert said.endswith(f", to resume.\n  finetune {words}\n")
    outcome = json.loads((output / "outcome.json").read_text())
    assert (outcome["state"], outcome["exit_code"]) == ("interrupted", 75)
    again = finish(*words_of(tiny, long_data, output))
    assert again.returncode == 0, again.stderr
    assert "resuming at epoch" in again.stderr
    assert_same_result(uninterrupted, output)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(
    uninterrupted: Path, tiny: Path, long_data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    process = start(*words_of(tiny, long_data, output), start_new_session=True)
    wait_for(output / "history.csv", process, text="\n2,")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert json.loads((output / "outcome.json").read_text())["state"] == "running"
    assert finish(*words_of(tiny, long_data, output)).returncode == 0
    assert_same_result(uninterrupted, output)


@pytest.mark.slow
def test_a_pipe_gets_plain_lines_and_one_object(uninterrupted: Path) -> None:
    stdout, stderr = (uninterrupted.parent / name for name in ("stdout", "stderr"))
    said = stderr.read_bytes().decode()
    assert "\x1b" not in said
    assert "\r" not in said
    assert len([line for line in said.splitlines() if line.startswith("epoch ")]) == 6
    assert json.loads(stdout.read_text())["run"] == str(uninterrupted)
    assert len(stdout.read_text().splitlines()) == 1
