"""A model that was handed over, and then damaged, is refused where it is taken up again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.errors import ExitCode
from tests.conftest import Cli, FinishedRun


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-500] ^= 4
    file.write_bytes(content)


def zero_tail(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-4096] + bytes(4096))


@pytest.fixture
def trained(finished_run: FinishedRun, tmp_path: Path) -> Path:
    return shutil.copytree(finished_run("freeze"), tmp_path / "trained")


@pytest.mark.parametrize("damage", [cut, flip, zero_tail])
def test_a_damaged_model_is_no_backbone(
    cli: Cli, trained: Path, image_folder: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """Neither torch nor safetensors notices a flipped bit."""
    damage(trained / "model" / "model.safetensors")
    result = cli("run", "-b", trained, "-d", image_folder, "-o", tmp_path / "next", "--epochs", 1)
    assert result.exit_code == ExitCode.USAGE
    assert "it has changed since it was written (sha256)" in result.stderr
    assert not (tmp_path / "next").exists()


def test_a_model_that_was_changed_on_purpose_is_taken(
    cli: Cli, trained: Path, image_folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(trained / "model", tmp_path / "model")
    flip(copy / "model.safetensors")
    config = json.loads((copy / "config.json").read_text())
    del config["finetune"]["sha256"]
    (copy / "config.json").write_text(json.dumps(config))
    words = ["run", "-b", copy, "-d", image_folder, "-o", tmp_path / "next", "--epochs", 1, "--workers", 0]
    assert cli(*words, "-s", "freeze").exit_code == 0
