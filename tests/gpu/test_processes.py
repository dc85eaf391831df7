"""Several processes with a GPU each. Skipped, with the reason, where there are not enough."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.faults.results import read_metrics

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not NUM_GPUS, reason="this machine has no CUDA device"),
]
SYNCHRONIZED = ("--set", "training.sync_batch_norm=true", "--set", "strategy.norm=train")
two = pytest.mark.skipif(NUM_GPUS < 2, reason="this machine has no two CUDA devices")


def run(tiny: Path, image_folder: Path, output: Path, *words: object) -> None:
    command = [sys.executable, "-m", "finetune", "run", "-b", tiny, "-d", image_folder, "-o", output]
    command += ["--epochs", 2, "--batch-size", 8, "--workers", 1, "--set", "training.precision=float32"]
    done = subprocess.run(
        [str(word) for word in (*command, *words)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"XDG_CACHE_HOME": str(output.parent / f"cache-{output.name}")},
    )
    assert done.returncode == 0, done.stderr


def assert_near(one: Path, other: Path) -> None:
    left, right = read_metrics(one), read_metrics(other)
    assert left["accuracy"] == pytest.approx(right["accuracy"], abs=0.06)
    assert left["loss"] == pytest.approx(right["loss"], abs=2e-2)


@pytest.mark.parametrize("strategy", ["freeze", "full"])
def test_one_gpu_under_the_launcher(tiny: Path, image_folder: Path, tmp_path: Path, strategy: str) -> None:
    run(tiny, image_folder, tmp_path / "plain", "-s", strategy)
    run(tiny, image_folder, tmp_path / "launched", "-s", strategy, "--gpus", 1)
    assert_near(tmp_path / "plain", tmp_path / "launched")


@two
@pytest.mark.parametrize(
    "words",
    [("-s", "freeze"), ("-s", "full", *SYNCHRONIZED)],
    ids=["freeze", "full"],
)
def test_two_gpus_learn_what_one_learns(
    tiny: Path, image_folder: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    run(tiny, image_folder, tmp_path / "one", *words)
    run(tiny, image_folder, tmp_path / "two", *words, "--gpus", 2)
    assert_near(tmp_path / "one", tmp_path / "two")
