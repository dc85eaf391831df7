"""What only a CUDA device shows. Skipped, with the reason, where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from finetune.runtime import resolve_device, resolve_precision
from finetune.training.finite import FiniteCheck
from tests.conftest import Cli

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]
QUICK = ("--epochs", 2, "--batch-size", 8, "--workers", 2)


def test_auto_takes_the_gpu_and_half_precision() -> None:
    device = resolve_device("auto")
    assert device == torch.device("cuda", 0)
    assert resolve_precision(device) in ("bfloat16", "float16")


@pytest.mark.parametrize("precision", ["auto", "float32", "float16"])
def test_a_run_on_the_gpu_is_complete(
    cli: Cli, pictures: Path, tiny: Path, tmp_path: Path, precision: str
) -> None:
    words = ("run", "-b", tiny, "-d", pictures, "-s", "full", "-o", tmp_path / "run", "--json", *QUICK)
    result = cli(*words, "--set", f"training.precision={precision}", "--set", "training.ema_decay=0.9")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["gpu"]
    assert "device: cuda:0" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_float32_on_the_gpu_agrees_with_the_cpu(cli: Cli, pictures: Path, tiny: Path, tmp_path: Path) -> None:
    losses = []
    for device in ("cpu", "cuda"):
        words = (
            "run",
            "-b",
            tiny,
            "-d",
            pictures,
            "-s",
            "freeze",
            "-o",
            tmp_path / device,
            "--device",
            device,
        )
        result = cli(*words, "--json", "--set", "training.precision=float32", *QUICK)
        losses.append(json.loads(result.stdout)["val_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_the_finite_check_reads_the_loss_it_was_asked_about() -> None:
    check = FiniteCheck(torch.device("cuda"))
    for value in (1.0, float("nan"), 2.0, float("inf"), 3.0):
        loss = torch.tensor(value, device="cuda")
        check.start(loss)
        loss += 1  # what comes later must not matter
        assert check.wait() == (value in (1.0, 2.0, 3.0))


def test_out_of_memory_is_a_clear_refusal(
    cli: Cli, pictures: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhaust(*_: object) -> None:
        torch.empty(2**50, device="cuda")

    monkeypatch.setattr("finetune.training.trainer.Trainer._train_step", exhaust)
    result = cli("run", "-b", tiny, "-d", pictures, "-o", tmp_path / "run", *QUICK)
    assert result.exit_code == 78
    assert "Halve --batch-size" in result.stderr
