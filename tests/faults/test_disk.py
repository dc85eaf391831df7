"""Disks that are full, too small or read-only: one message with its remedy, nothing half written, no loss."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.errors import ExitCode
from finetune.runs import files as files_module
from finetune.runs.folder import RunFolder
from finetune.training.checkpoint import CheckpointStore
from finetune.training.trainer import Trainer
from tests.conftest import Cli
from tests.sweeps import slow_except

ROOT = Path(__file__).parents[2]
QUICK = ("--epochs", 3, "--batch-size", 8, "--workers", 0, "-s", "full")


def words_of(tiny: Path, data: Path, output: Path) -> list[object]:
    return ["run", "-b", tiny, "-d", data, "-o", output, *QUICK]


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from typer.testing import CliRunner

    from finetune.cli.app import app

    output = tmp_path_factory.mktemp("whole") / "run"
    result = CliRunner().invoke(app, [str(word) for word in words_of(tiny, image_folder, output)])
    assert result.exit_code == 0, result.output
    return output


def assert_same_result(one: Path, two: Path) -> None:
    for name in ("model/model.safetensors", "predictions.csv", "confusion_matrix.csv", "split.csv"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def assert_nothing_half(output: Path) -> None:
    leftovers = [path for path in output.rglob("*") if path.name.endswith((".part", ".old", ".trash"))]
    assert leftovers == []
    CheckpointStore(output / "checkpoints").load()  # raises where none of them verifies
    for path in output.rglob("*.json"):
        json.loads(path.read_text())


def assert_disk_refusal(output: Path, code: int, said: str, remedy: str = "Free some space") -> None:
    assert code == ExitCode.DISK == 74, said
    assert said.count("error: ") == 1
    assert f"{remedy}, and start the same command again." in said
    assert "Traceback" not in said
    assert_nothing_half(output)


def outcome_of(output: Path) -> tuple[str, str, bool]:
    outcome = json.loads((output / "outcome.json").read_text())
    return outcome["state"], outcome["class"], outcome["retryable"]


# --- no space, in this process -------------------------------------------------------------------


class FullDisk:
    """Writing files of a name fails as it does on a full disk, after some of the bytes, from a time on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, part_of_name: str, good: int = 0) -> None:
        self.name, self.good, self.full = part_of_name, good, True
        self.fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self.sync)

    def sync(self, descriptor: int) -> None:
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if self.full and self.name in path and path.endswith(".part"):
            self.good -= 1
            if self.good < 0:
                os.ftruncate(descriptor, 7)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        self.fsync(descriptor)


FILES = (
    "checkpoints/.checkpoint-000001.part/.state",
    "checkpoints/.checkpoint-000006.part/.best",
    "checkpoints/.checkpoint-000003.part/.manifest",
    ".split.csv",
    ".classes.txt",
    ".plan.csv",
    ".environment.json",
    ".history.csv",
    ".predictions.csv",
    ".confusion_matrix.csv",
    ".metrics.json",
    ".model.part/.model.safetensors",
    ".model.part/.config.json",
)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "name",
    slow_except(["checkpoints/.checkpoint-000003.part/.manifest", ".model.part/.model.safetensors"], FILES),
)
def test_a_disk_that_is_full_for_one_file_costs_nothing_but_a_second_start(
    cli: Cli,
    undisturbed: Path,
    tiny: Path,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    output = tmp_path / "run"
    every_step = "finetune.training.checkpoint.CheckpointInterval.is_due"
    monkeypatch.setattr(every_step, lambda *_, **__: True)
    disk = FullDisk(monkeypatch, name)
    result = cli(*words_of(tiny, image_folder, output))
    assert_disk_refusal(output, result.exit_code, result.stderr)
    assert "No space left on device" in result.stderr
    assert outcome_of(output) == ("failed", "disk", True)
    disk.full = False
    assert cli(*words_of(tiny, image_folder, output)).exit_code == 0
    assert_nothing_half(output)
    assert_same_result(output, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("good", slow_except([1], [0, 1, 2]))
def test_an_outcome_that_cannot_be_written_is_an_error_too(
    cli: Cli,
    undisturbed: Path,
    tiny: Path,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    good: int,
) -> None:
    """It is written when the folder is taken, when work begins, and at the end."""
    output = tmp_path / "run"
    disk = FullDisk(monkeypatch, ".outcome.json", good)
    result = cli(*words_of(tiny, image_folder, output))
    assert_disk_refusal(output, result.exit_code, result.stderr)
    assert not (output / "outcome.json").exists() or outcome_of(output)[0] == "running"
    disk.full = False
    assert cli(*words_of(tiny, image_folder, output)).exit_code == 0
    assert outcome_of(output)[0] == "done"
    assert_same_result(output, undisturbed)


def test_too_little_space_for_one_checkpoint_is_refused_before_training(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(files_module.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(Trainer, "_train_epoch", lambda _: pytest.fail("training began"))
    result = cli(*words_of(tiny, image_folder, tmp_path / "run"))
    assert result.exit_code == ExitCode.DISK, result.stderr
    assert re.search("a checkpoint may need [3-9] MB, and 1 MB are free", result.stderr)
    assert "Free some space, or choose another disk with --output." in result.stderr
    assert outcome_of(tmp_path / "run") == ("failed", "disk", True)


# --- the system's own refusals -------------------------------------------------------------------

LIMITED = """
import resource, sys
from finetune.cli.app import main
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
main()
"""


def can_mount() -> bool:
    try:
        command = ["unshare", "-m", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


needs_mounts = pytest.mark.skipif(not can_mount(), reason="mounts are not for this user")


def execute(command: list[str], words: list[object]) -> tuple[int, str]:
    result = subprocess.run(
        [*command, *map(str, words)], capture_output=True, text=True, check=False, cwd=ROOT, timeout=100
    )
    return result.returncode, result.stderr


@pytest.mark.slow
def test_a_limit_on_file_sizes(
    cli: Cli, undisturbed: Path, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    """A checkpoint has 3 MB, and EFBIG comes in the middle of it; the outcome is small enough."""
    output = tmp_path / "run"
    code, said = execute([sys.executable, "-c", LIMITED], words_of(tiny, image_folder, output))
    assert_disk_refusal(output, code, said)
    assert "File too large" in said
    assert outcome_of(output) == ("failed", "disk", True)
    assert cli(*words_of(tiny, image_folder, output)).exit_code == 0
    assert_same_result(output, undisturbed)


@pytest.mark.slow
@needs_mounts
@pytest.mark.parametrize("size", ["5m", "4m", "12k"])
def test_a_disk_that_is_really_full(
    cli: Cli, undisturbed: Path, tiny: Path, image_folder: Path, tmp_path: Path, size: str
) -> None:
    """Room for a checkpoint and not for the model; not for a checkpoint; for next to nothing."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    script = f'mount -t tmpfs -o size={size} tmpfs {disk} && "$@"; code=$?; cp -a {disk}/. {kept}; exit $code'
    command = ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-m", "finetune"]
    code, said = execute(command, words_of(tiny, image_folder, disk / "run"))
    assert code == ExitCode.DISK, said
    assert said.count("error: ") == 1 and "Free some space" in said and "Traceback" not in said
    assert_nothing_half(kept / "run")
    shutil.move(kept / "run", disk / "run")
    result = cli(*words_of(tiny, image_folder, disk / "run"))
    assert result.exit_code == 0, result.output
    assert_same_result(disk / "run", undisturbed)


READ_ONLY: dict[str, Callable[[Path], str]] = {
    "mount": lambda folder: f'mount --bind {folder} {folder} && mount -o remount,ro,bind {folder} && "$@"',
    "mode": lambda folder: f'chmod 555 {folder} && exec setpriv --bounding-set=-dac_override "$@"',
}


def in_read_only(way: str, folder: Path) -> list[str]:
    return ["unshare", "-m", "sh", "-c", READ_ONLY[way](folder), "sh", sys.executable, "-m", "finetune"]


@pytest.mark.slow
@needs_mounts
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not installed")
@pytest.mark.parametrize("way", slow_except(["mode"], READ_ONLY))
def test_a_folder_that_may_not_be_written(tiny: Path, image_folder: Path, tmp_path: Path, way: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    code, said = execute(in_read_only(way, folder), words_of(tiny, image_folder, folder))
    assert_disk_refusal(folder, code, said, "Choose a folder you may write to with --output")
    assert list(folder.iterdir()) == []


@pytest.mark.slow
@needs_mounts
def test_a_finished_run_on_a_read_only_disk_is_still_finished(
    undisturbed: Path, tiny: Path, image_folder: Path
) -> None:
    code, said = execute(in_read_only("mount", undisturbed), words_of(tiny, image_folder, undisturbed))
    assert code == 0, said
    assert "already holds this run" in said


# --- words that cannot be written ----------------------------------------------------------------


class Full:
    """A path on which everything can be opened, and nothing written."""

    def __get__(self, *_: object) -> Path:
        return Path("/dev/full")


def test_a_log_that_cannot_be_written_does_not_end_the_run(
    cli: Cli,
    undisturbed: Path,
    tiny: Path,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The result matters more than what was said on the way to it; the user is told once."""
    monkeypatch.setattr(RunFolder, "log", Full())
    result = cli(*words_of(tiny, image_folder, tmp_path / "run"))
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("warning: /dev/full cannot be written") == 1
    assert_same_result(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_an_stderr_that_cannot_be_written_does_not_end_the_run(
    undisturbed: Path, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    """As ``finetune run ... 2>log`` on a full disk."""
    with Path("/dev/full").open("w") as full:
        command = [
            sys.executable,
            "-m",
            "finetune",
            *map(str, words_of(tiny, image_folder, tmp_path / "run")),
        ]
        result = subprocess.run(command, stderr=full, check=False, cwd=ROOT)
    assert result.returncode == 0
    assert_same_result(tmp_path / "run", undisturbed)
