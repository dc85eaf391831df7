"""What only a CUDA device shows. Skipped, with the reason, where there is none."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from finetune.recipe import TrainingSettings
from finetune.system.device import resolve_device, resolve_precision
from finetune.training.optim import build_optimizer
from finetune.training.state import compute_norm, is_finite
from tests.conftest import Cli
from tests.training.helpers import exhaust_memory

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
    cli: Cli, image_folder: Path, tiny: Path, tmp_path: Path, precision: str
) -> None:
    words = ("run", "-b", tiny, "-d", image_folder, "-s", "full", "-o", tmp_path / "run", "--json", *QUICK)
    result = cli(*words, "--set", f"training.precision={precision}", "--set", "training.ema_decay=0.9")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["gpu"]
    assert "device: cuda:0" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_float32_on_the_gpu_agrees_with_the_cpu(
    cli: Cli, image_folder: Path, tiny: Path, tmp_path: Path
) -> None:
    losses = []
    for device in ("cpu", "cuda"):
        words = (
            "run",
            "-b",
            tiny,
            "-d",
            image_folder,
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


def test_the_finite_check_reads_loss_and_gradient() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3, device="cuda"))
    for loss, slope in ((1.0, 1.0), (float("nan"), 1.0), (1.0, float("inf"))):
        parameter.grad = torch.full((3,), slope, device="cuda")
        expected = math.isfinite(loss) and math.isfinite(slope)
        assert is_finite(torch.tensor(loss, device="cuda"), compute_norm([parameter])) == expected


def test_memory_that_runs_out_halves_the_microbatch(
    cli: Cli, image_folder: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    microbatches = exhaust_memory(monkeypatch, torch.device("cuda"))
    result = cli("run", "-b", tiny, "-d", image_folder, "-o", tmp_path / "run", "--json", *QUICK)
    assert result.exit_code == 0, result.stderr
    assert microbatches[2] > 0
    assert json.loads(result.stdout)["microbatch"] == microbatches[2]


@pytest.mark.parametrize("strategy", ["freeze", "top"])
def test_kept_features_on_the_gpu(
    cli: Cli, image_folder: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    losses = []
    for cache in ("kept", "found", "off"):
        words = (
            "run",
            "-b",
            tiny,
            "-d",
            image_folder,
            "-s",
            strategy,
            "-o",
            tmp_path / cache,
            "--json",
            *QUICK,
        )
        more = ("--set", "input.augmentation=none", *(("--set", "cache=off") if cache == "off" else ()))
        result = cli(*words, *more, "--set", "training.precision=float32")
        assert result.exit_code == 0, result.output
        losses.append(json.loads(result.stdout)["val_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] == pytest.approx(losses[2], rel=1e-2)


def test_the_optimiser_is_one_kernel_and_goes_on(
    cli: Cli, image_folder: Path, tiny: Path, tmp_path: Path
) -> None:
    words: tuple[object, ...] = ("run", "-b", tiny, "-d", image_folder, "-s", "full", "-o", tmp_path / "run")
    words += ("--json", "--set", "training.optimizer=adamw", "--set", "training.precision=float16")
    words += ("--set", "training.clip_grad=1.0", "--workers", 2)
    assert cli(*words, "--epochs", 1).exit_code == 0
    assert cli(*words, "--epochs", 2).exit_code == 0  # with a batch size that the first one chose
    weight = torch.zeros(3, device="cuda", requires_grad=True)
    settings = TrainingSettings(optimizer="adamw")
    groups = [{"params": [weight], "lr": 0.1, "weight_decay": 0.0}]
    assert build_optimizer(groups, settings).defaults["fused"]


@pytest.mark.parametrize("features", ["last", "all"])
def test_a_solved_head_on_the_gpu_agrees_with_the_cpu(
    cli: Cli, image_folder: Path, tiny: Path, tmp_path: Path, features: str
) -> None:
    losses = []
    for device in ("cpu", "cuda"):
        words = ("run", "-b", tiny, "-d", image_folder, "-s", "freeze", "-o", tmp_path / device, "--json")
        result = cli(*words, "--device", device, "--set", f"strategy.features={features}", "--workers", 2)
        assert result.exit_code == 0, result.output
        losses.append(json.loads(result.stdout)["val_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=5e-2)


def test_features_of_the_gpu_agree_with_those_of_the_cpu(
    cli: Cli, image_folder: Path, tiny: Path, tmp_path: Path
) -> None:
    tables = []
    for device in ("cpu", "cuda"):
        path = tmp_path / f"{device}.csv"
        result = cli(
            "extract", "-b", tiny, "-d", image_folder, "-o", path, "--device", device, "--workers", 2
        )
        assert result.exit_code == 0, result.output
        tables.append(pd.read_csv(path))
    assert list(tables[0]["path"]) == list(tables[1]["path"])
    assert np.allclose(tables[0].iloc[:, 3:], tables[1].iloc[:, 3:], rtol=1e-2, atol=1e-3)


def test_predictions_of_a_gpu_are_those_of_the_cpu(
    cli: Cli, image_folder: Path, tiny: Path, tmp_path: Path
) -> None:
    words = ("run", "-b", tiny, "-d", image_folder, "-s", "freeze", "-o", tmp_path / "run", *QUICK)
    assert cli(*words).exit_code == 0
    tables = []
    for device in ("cpu", "cuda"):
        output = tmp_path / f"{device}.csv"
        done = cli("predict", tmp_path / "run", image_folder / "val", "-o", output, "--device", device)
        assert done.exit_code == 0, done.output
        tables.append(pd.read_csv(output))
    assert tables[0]["path"].tolist() == tables[1]["path"].tolist()
    assert np.abs(tables[0]["prob_red"] - tables[1]["prob_red"]).max() < 0.01


def test_an_evaluation_on_the_gpu_is_the_runs_own(
    cli: Cli, image_folder: Path, tiny: Path, tmp_path: Path
) -> None:
    words = ("run", "-b", tiny, "-d", image_folder, "-s", "freeze", "-o", tmp_path / "run", "--json", *QUICK)
    run = json.loads(cli(*words).stdout)
    assert run["peak_gpu_memory_bytes"] > 0
    done = cli("evaluate", tmp_path / "run", "-o", tmp_path / "out", "--device", "cuda", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["loss"] == pytest.approx(run["loss"], abs=0.02)
