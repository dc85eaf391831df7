"""Real photographs and real weights, if they are stored beside the project."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Cli


def run(cli: Cli, weights: Path, photographs: Path, output: Path, *words: object) -> dict[str, object]:
    result = cli(
        *(
            "run",
            "-b",
            "squeezenet1_0",
            "--weights",
            weights,
            "-d",
            photographs,
            "-o",
            output,
            "--json",
            *words,
        )
    )
    assert result.exit_code == 0, result.output
    assert "50 of 50 tensors matched, 2 replaced" in result.stderr
    metrics: dict[str, object] = json.loads(result.stdout)
    return metrics


@pytest.mark.slow
def test_small_images_are_enough_for_ants_and_bees(
    cli: Cli, squeezenet_weights: Path, hymenoptera: Path, tmp_path: Path
) -> None:
    quick = ("-s", "freeze", "--epochs", 3, "--img-size", 128, "--set", "input.augmentation=none")
    metrics = run(cli, squeezenet_weights, hymenoptera, tmp_path / "run", *quick)
    assert (metrics["num_train"], metrics["num_samples"]) == (245, 153)
    assert metrics["accuracy"] >= 0.87


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["freeze", "top", "full"])
def test_every_strategy_learns_ants_and_bees(
    cli: Cli, squeezenet_weights: Path, hymenoptera: Path, tmp_path: Path, strategy: str
) -> None:
    metrics = run(cli, squeezenet_weights, hymenoptera, tmp_path / "run", "-s", strategy, "--epochs", 8)
    assert metrics["accuracy"] >= 0.92
