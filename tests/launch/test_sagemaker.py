"""SageMaker: what it leaves in /opt/ml is understood, and it finds what it looks for."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from finetune.cli import hosted
from finetune.cli.app import app
from finetune.data.layout import SPLIT_NAMES
from finetune.errors import DiskError, ExitCode, UsageError
from finetune.launch.platforms import (
    BASE,
    LONGEST_FAILURE,
    SPLIT_CHANNELS,
    find_platform,
    find_sagemaker,
    write_failure,
)
from tests.conftest import draw_folder
from tests.launch.machines import SETTINGS, environment, finish, lay_out, start


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Lay out /opt/ml for this process, which no platform above has told anything."""

    def make(hyperparameters: Mapping[str, Any], channels: Mapping[str, Path], **more: Any) -> Path:
        monkeypatch.setenv(BASE, str(tmp_path / "ml"))
        monkeypatch.setenv(hosted.TRANSLATED, "")
        return lay_out(tmp_path / "ml", hyperparameters, channels, **more)

    return make


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run ``finetune`` with these words in this process, and return its exit code."""

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["finetune", *map(str, words)])
        monkeypatch.setenv(hosted.TRANSLATED, "")
        with pytest.raises(SystemExit) as end:
            hosted.call(app)
        return int(end.value.code or 0)

    return run


def words_of(*given: str) -> list[str]:
    platform = find_platform()
    assert platform is not None
    command: Any = get_command(app)
    return hosted.translate(platform, given, command.commands["run"])[1]


def no_images(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir(exist_ok=True)
    return tmp_path / "empty"


# --- what it says --------------------------------------------------------------------------------


def test_elsewhere_there_is_no_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(BASE, str(tmp_path))
    assert find_platform() is None
    (tmp_path / "input" / "config").mkdir(parents=True)
    assert find_platform() is None
    write_failure("nobody", "hears this")
    assert not (tmp_path / "output").exists()


def test_hyperparameters_are_flags_and_keys(job: Callable[..., Path], tmp_path: Path) -> None:
    base = job(
        {
            "backbone": '"resnet50"',  # as SageMaker's framework estimators write it
            "strategy": "top",  # as its plain Estimator does
            "batch_size": "64",
            "img-size": "96",
            "training.lr": "1e-05",
            "tracking.to": '["tensorboard"]',
            "deterministic": "false",
            "offline": "True",
            "allow_leaks": "false",
            "group_by": "null",
            "gpus": "4",
            "sagemaker_program": '"train.py"',
            "sagemaker_region": '"eu-west-1"',
            "_tuning_objective_metric": "accuracy",
        },
        {"training": no_images(tmp_path)},
    )
    assert words_of() == [
        *("--backbone=resnet50", "--batch-size=64", "--set", "deterministic=false", "--gpus=4"),
        *("--img-size=96", "--offline", "--strategy=top", "--set", 'tracking.to=["tensorboard"]'),
        *("--set", "training.lr=1e-05", "--output", str(base / "checkpoints" / "run")),
        *("--data", str(base / "input" / "data" / "training")),
    ]


def test_the_users_words_count_more(job: Callable[..., Path], tmp_path: Path) -> None:
    job({"backbone": "resnet50"}, {"training": no_images(tmp_path)})
    words = words_of("--data", "/mine", "-o", "/there", "--backbone", "resnet18")
    assert words == ["--backbone=resnet50", "--data", "/mine", "-o", "/there", "--backbone", "resnet18"]
    assert "--data" not in words_of("--set", "data.path=/mine")
    assert "--data" not in words_of("--data=/mine", "--epochs", "many"), "mistakes are told later"


@pytest.mark.parametrize("key", ["data", "data.path"])
def test_data_may_be_named_by_a_hyperparameter(job: Callable[..., Path], tmp_path: Path, key: str) -> None:
    job({key: "/mine", "output": "/there"}, {"a": no_images(tmp_path), "b": no_images(tmp_path)})
    assert words_of() in (
        ["--data=/mine", "--output=/there"],
        ["--set", "data.path=/mine", "--output=/there"],
    )


def test_a_switch_is_on_or_off(job: Callable[..., Path], tmp_path: Path) -> None:
    job({"offline": "perhaps"}, {"training": no_images(tmp_path)})
    with pytest.raises(UsageError, match="hyperparameter offline=perhaps"):
        words_of()


@pytest.mark.parametrize(
    ("channels", "found"),
    [
        (["training"], "training"),
        (["images"], "images"),
        (["train"], "train"),
        (["train", "model"], "train"),
        (["train", "validation"], ""),
        (["Train", "val", "test", "weights"], ""),
    ],
)
def test_channels(job: Callable[..., Path], tmp_path: Path, channels: list[str], found: str) -> None:
    base = job({}, dict.fromkeys(channels, no_images(tmp_path)))
    assert words_of()[-2:] == ["--data", str(base / "input" / "data" / found)]


def test_channels_that_say_nothing(job: Callable[..., Path], tmp_path: Path) -> None:
    job({}, dict.fromkeys(["training", "validate"], no_images(tmp_path)))
    with pytest.raises(UsageError, match="channels training, validate: it is not clear") as refusal:
        words_of()
    assert refusal.value.exit_code == ExitCode.USAGE


def test_no_channel_leaves_the_data_to_the_user(job: Callable[..., Path]) -> None:
    job({}, {})
    assert "--data" not in words_of()


def test_a_pipe_is_refused(job: Callable[..., Path], tmp_path: Path) -> None:
    base = job({}, {"training": no_images(tmp_path)})
    modes = {"training": {"TrainingInputMode": "Pipe"}}
    (base / "input/config/inputdataconfig.json").write_text(json.dumps(modes))
    with pytest.raises(UsageError, match="channel training"):
        words_of()


def test_parts_are_called_as_in_a_folder() -> None:
    assert set(SPLIT_CHANNELS) == set(SPLIT_NAMES)


def test_without_checkpoints_the_run_is_among_the_results(job: Callable[..., Path], tmp_path: Path) -> None:
    base = job({}, {"training": no_images(tmp_path)}, checkpoints=False)
    assert words_of()[:2] == ["--output", str(base / "output" / "data" / "run")]


@pytest.mark.parametrize("content", ["{", "[]", '{"hosts": 3'])
def test_damaged_files_of_the_platform(
    job: Callable[..., Path], call: Callable[..., int], content: str
) -> None:
    base = job({}, {})
    (base / "input/config/resourceconfig.json").write_text(content)
    assert call("train") == ExitCode.USAGE


# --- several machines ----------------------------------------------------------------------------


def test_machines_that_do_not_know_of_each_other(
    job: Callable[..., Path],
    call: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = job({}, {"training": no_images(tmp_path)}, hosts=("algo-1", "algo-2"))
    assert call("train") == ExitCode.USAGE
    assert "each would train a model of its own" in capsys.readouterr().err
    assert "SageMaker: 2 machines" in (base / "output" / "failure").read_text()
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="the run folder must be on a disk that all of them share"):
        words_of()
    assert words_of("--output", "/fsx/run")[:2] == ["--output", "/fsx/run"]


# --- what it finds -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_job_from_beginning_to_end(image_folder: Path, tiny: Path, tmp_path: Path) -> None:
    """In processes of its own, with the parent that watches: what SageMaker starts is ``finetune train``."""
    parts = {"train": image_folder / "train", "validation": image_folder / "val"}
    base = lay_out(tmp_path / "ml", SETTINGS | {"backbone": str(tiny)}, parts)
    (base / "output" / "failure").write_text("of an attempt before")
    done = finish("train", env=environment(SAGEMAKER_BASE_DIR=base))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("SageMaker: finetune run") == 1, "the child gets plain words"
    run = base / "checkpoints" / "run"
    assert {path.name for path in (base / "model").iterdir()} == {
        path.name for path in (run / "model").iterdir()
    }
    name = "model.safetensors"
    assert (base / "model" / name).read_bytes() == (run / "model" / name).read_bytes()
    results = base / "output" / "data"
    assert json.loads((results / "outcome.json").read_text())["state"] == "done"
    assert json.loads((results / "metrics.json").read_text())["num_samples"] == 18
    assert (results / "report.html").is_file() and any((results / "plots").iterdir())
    assert not (results / "checkpoints").exists() and not (results / "model").exists()
    assert not (base / "output" / "failure").exists()


@pytest.mark.slow
def test_a_spot_machine_that_is_taken_away(
    job: Callable[..., Path],
    call: Callable[..., int],
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """SIGTERM saves, nothing is called a failure, and the same job goes on where it stopped."""
    images = draw_folder(tmp_path / "long", {"red": 30, "blue": 30})
    settings = SETTINGS | {"backbone": str(tiny), "epochs": "15", "batch_size": "4", "strategy": "full"}
    base = job(settings, {"training": images})
    process = start("train", env=environment(SAGEMAKER_BASE_DIR=base))
    try:
        deadline = time.monotonic() + 60
        while not (base / "checkpoints/run/history.csv").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == ExitCode.INTERRUPTED, said
    outcome = json.loads((base / "checkpoints/run/outcome.json").read_text())
    assert outcome["state"] == "interrupted" and outcome["step"] > 0
    assert not (base / "output" / "failure").exists()
    assert not any((base / "model").iterdir())
    assert call("train") == 0
    assert "resuming at epoch" in capsys.readouterr().err
    assert (base / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        ({"strategy": "tpo"}, 2, "did you mean 'top'"),
        ({"epochs": "many"}, 2, "--epochs"),
        ({"learning_rate": "0.1"}, 2, "there is no `learning_rate`"),
        ({}, 65, "holds no class folders and no images"),
    ],
)
def test_refusals_are_failures_with_a_reason(
    job: Callable[..., Path],
    call: Callable[..., int],
    tiny: Path,
    tmp_path: Path,
    settings: dict[str, str],
    code: int,
    said: str,
) -> None:
    base = job({"backbone": str(tiny)} | settings, {"training": no_images(tmp_path)})
    assert call("train") == code
    assert said in (base / "output" / "failure").read_text()


def test_a_word_that_does_not_exist_is_a_failure_with_a_reason(
    job: Callable[..., Path], call: Callable[..., int], tmp_path: Path
) -> None:
    base = job({}, {"training": no_images(tmp_path)})
    assert call("train", "--epoch", "3") == ExitCode.USAGE
    assert "No such option" in (base / "output" / "failure").read_text()


@pytest.mark.slow
def test_a_process_that_was_killed_is_a_failure_with_a_reason(
    tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    """Before it could say anything, and before there was a folder to write an outcome into."""
    base = lay_out(tmp_path / "ml", SETTINGS | {"backbone": str(tiny)}, {"training": image_folder})
    process = start("train", env=environment(SAGEMAKER_BASE_DIR=base))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        deadline = time.monotonic() + 60
        while not (child := children.read_text().split()):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(int(child[0]), signal.SIGKILL)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 137, said
    assert "exit code 137" in (base / "output" / "failure").read_text()


def test_the_outcome_that_the_parent_wrote_is_the_reason(
    job: Callable[..., Path], tmp_path: Path, call: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a child was killed for the last time: an earlier attempt's reason is not the last one."""
    base = job({}, {"training": no_images(tmp_path)})

    def end(_: object) -> int:
        write_failure("the first attempt met something unforeseen", "Report it.")
        outcome = {"state": "failed", "message": "ended by SIGKILL", "hint": "Lower it.", "exit_code": 137}
        folder = base / "checkpoints" / "run"
        folder.mkdir()
        (folder / "outcome.json").write_text(json.dumps(outcome))
        return 137

    monkeypatch.setattr(hosted, "_run", end)
    assert call("train") == 137
    assert (base / "output" / "failure").read_text() == "ended by SIGKILL\nLower it.\n"


def test_a_failure_that_was_overcome_is_none(
    job: Callable[..., Path], tmp_path: Path, call: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = job({}, {"training": no_images(tmp_path)})

    def end(_: object) -> int:
        write_failure("the first attempt met something unforeseen", "Report it.")
        return 0

    monkeypatch.setattr(hosted, "_run", end)
    assert call("train") == 0
    assert not (base / "output" / "failure").exists()


def test_a_long_reason_keeps_its_remedy(job: Callable[..., Path]) -> None:
    base = job({}, {})
    write_failure("begin " + "x" * 5000 + " end", "Do this.")
    text = (base / "output" / "failure").read_text()
    assert len(text) <= LONGEST_FAILURE
    assert text.startswith("begin ") and text.endswith(" end\nDo this.\n") and " ... " in text


def test_only_the_first_process_writes_the_reason(
    job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = job({}, {})
    monkeypatch.setenv("RANK", "1")
    write_failure("another process is gone", "Look there.")
    assert not (base / "output" / "failure").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_training(
    job: Callable[..., Path], tmp_path: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    base = job({}, {"training": no_images(tmp_path)})
    (base / "model").rmdir()
    (base / "model").write_text("a file, which root cannot write into either")
    assert call("train") == ExitCode.DISK == DiskError.exit_code
    assert "expects results" in capsys.readouterr().err


def test_other_commands_are_left_alone(
    job: Callable[..., Path], call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    job({"backbone": "resnet50"}, {})
    assert call("recipes") == 0
    assert "SageMaker" not in capsys.readouterr().err


def test_train_is_no_command_elsewhere(call: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BASE, "/nowhere")
    assert find_sagemaker() is None
    assert call("train") == ExitCode.USAGE
