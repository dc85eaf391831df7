"""Vertex AI: AIP_* variables name folders, in buckets that need not be able to do all that disks do."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from finetune.cli import hosted
from finetune.cli.app import app
from finetune.errors import ExitCode, UsageError
from finetune.launch.platforms import Platform, can_rename_folders, find_platform, find_vertex

VARIABLES = (
    "AIP_MODEL_DIR",
    "AIP_CHECKPOINT_DIR",
    "AIP_TENSORBOARD_LOG_DIR",
    "CLOUD_ML_JOB_ID",
    "CLUSTER_SPEC",
)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(hosted.TRANSLATED, "")


def words_of(*given: str) -> tuple[Platform, Sequence[str]]:
    platform = find_platform()
    assert platform is not None
    command: Any = get_command(app)
    return hosted.translate(platform, given, command.commands["run"])


def refuse_to_rename_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """As buckets do: files may be renamed, folders may not."""
    rename = Path.rename

    def renamed(path: Path, target: Path) -> Path:
        if path.is_dir():
            raise OSError(24, "Too many open files")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renamed)


def test_elsewhere_there_is_no_platform() -> None:
    assert find_platform() is None


def test_buckets_are_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AIP_CHECKPOINT_DIR", "gs://bucket/job/checkpoints/")
    monkeypatch.setenv("AIP_MODEL_DIR", "gs://bucket/job/model/")
    monkeypatch.setenv("AIP_TENSORBOARD_LOG_DIR", "gs://bucket/job/logs/")
    platform = find_vertex(tmp_path)
    assert platform is not None
    assert platform.output == tmp_path / "bucket/job/checkpoints/run"
    assert platform.model == tmp_path / "bucket/job/model"
    assert platform.tensorboard == tmp_path / "bucket/job/logs"
    assert not any(tmp_path.iterdir()), "to look changes nothing"
    platform = find_vertex()
    assert platform is not None and platform.model == Path("/gcs/bucket/job/model")


def test_the_run_is_where_it_outlives_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AIP_CHECKPOINT_DIR", str(tmp_path / "kept"))
    platform, words = words_of("--data", "/gcs/bucket/photos")
    assert words == ["--data", "/gcs/bucket/photos", "--output", str(tmp_path / "kept" / "run")]
    assert (platform.results, platform.warning) == (None, "")
    assert not any((tmp_path / "kept").iterdir()), "what was tried is gone"
    _, words = words_of("--output", "/mine")
    assert words == ["--output", "/mine"]


def test_a_bucket_that_cannot_rename_folders_gets_the_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AIP_CHECKPOINT_DIR", str(tmp_path / "kept"))
    monkeypatch.setenv("CLOUD_ML_JOB_ID", "123")
    refuse_to_rename_folders(monkeypatch)
    assert not can_rename_folders(tmp_path)
    platform, words = words_of()
    assert words == ["--output", "runs/123"], "the same in every process of the job"
    assert platform.results == tmp_path / "kept" / "run"
    assert "begins from scratch" in platform.warning


def test_without_a_base_folder_there_is_a_run_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUD_ML_JOB_ID", "123")
    platform, words = words_of()
    assert words == ["--output", "runs/123"]
    assert (platform.model, platform.results) == (None, None)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["finetune", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            hosted.call(app)
        return int(end.value.code or 0)

    return run


def spec(**pools: list[str]) -> str:
    return json.dumps({"cluster": pools, "task": {"type": "workerpool0", "index": 0}, "environment": "cloud"})


def test_one_machine_and_its_servers_are_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUD_ML_JOB_ID", "123")
    monkeypatch.setenv("CLUSTER_SPEC", spec(workerpool0=["a:2222"], workerpool2=["b:2222"]))
    words_of()


def test_machines_that_do_not_know_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUD_ML_JOB_ID", "123")
    monkeypatch.setenv("CLUSTER_SPEC", spec(workerpool0=["a:2222"], workerpool1=["b:2222", "c:2222"]))
    with pytest.raises(UsageError, match="Vertex AI: 3 machines"):
        words_of()
    monkeypatch.setenv("RANK", "1")
    words_of("--output", "/gcs/bucket/run")


@pytest.mark.parametrize("text", ["{", "[]", '{"cluster": 3}', '{"cluster": {"workerpool0": 3}}'])
def test_a_damaged_cluster_spec(monkeypatch: pytest.MonkeyPatch, call: Callable[..., int], text: str) -> None:
    monkeypatch.setenv("CLOUD_ML_JOB_ID", "123")
    monkeypatch.setenv("CLUSTER_SPEC", text)
    assert call("run") == ExitCode.USAGE


@pytest.mark.slow
def test_a_job_from_beginning_to_end(
    monkeypatch: pytest.MonkeyPatch, call: Callable[..., int], image_folder: Path, tiny: Path, tmp_path: Path
) -> None:
    """On a bucket that renames no folders; the folder of checkpoints and the model stay behind."""
    monkeypatch.chdir(tmp_path)
    for name, folder in zip(VARIABLES, ("model", "kept", "logs", "123"), strict=False):
        monkeypatch.setenv(name, str(tmp_path / folder) if folder != "123" else folder)
    with monkeypatch.context() as bucket:
        refuse_to_rename_folders(bucket)
        platform, words = words_of()
    monkeypatch.setattr(hosted, "translate", lambda found, given, run: (platform, [*given, *words]))
    flags = ("--epochs", 1, "--batch-size", 8, "--workers", 0, "--set", "tracking.to=[tensorboard]")
    code = call("run", "--data", image_folder, "--backbone", tiny, *flags)
    assert code == 0
    run = tmp_path / "runs" / "123"
    assert (tmp_path / "model/model.safetensors").read_bytes() == (
        run / "model/model.safetensors"
    ).read_bytes()
    assert json.loads((tmp_path / "kept/run/outcome.json").read_text())["state"] == "done"
    assert not (tmp_path / "kept/run/checkpoints").exists()
    assert [path.name for path in (tmp_path / "logs").iterdir()] == [
        path.name for path in (run / "tracking" / "tensorboard").iterdir()
    ]


def test_a_series_has_no_single_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hosted._copy_model(hosted.RunFolder(tmp_path / "series"), tmp_path / "model")
    assert "holds no single model" in capsys.readouterr().err


def test_a_model_that_cannot_be_copied_is_no_success(tmp_path: Path) -> None:
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "file").write_text("in the way")
    platform = Platform("a platform", output=tmp_path / "run", model=tmp_path / "file" / "model")
    folder = hosted.RunFolder(tmp_path / "run")
    assert hosted._deliver(platform, folder, 0) == ExitCode.DISK
    assert hosted._deliver(platform, folder, ExitCode.DATA) == ExitCode.DATA
