"""A folder of arrays is a data set like a folder of images: every command, with AlphaGo's policy network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import finetune
from tests.conftest import Cli

WORDS = ("--device", "cpu", "--workers", 0)


@pytest.fixture(scope="module")
def boards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of small boards, which differ in their first plane."""
    root = tmp_path_factory.mktemp("boards")
    random = np.random.default_rng(0)
    for label, low in (("left", 0), ("right", 12)):
        (root / label).mkdir()
        for index in range(6):
            planes = (random.random((48, 19, 19)) < 0.1).astype(np.uint8)
            planes[0] = 0
            planes[0, :, low : low + 6] = 1
            np.save(root / label / f"{index}.npy", planes)
    return root


@pytest.fixture(scope="module")
def run(boards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network trained on the boards."""
    from finetune.cli.app import app

    output = tmp_path_factory.mktemp("trained") / "run"
    scratch = ("-b", "alphago_policy_128", "-s", "scratch", "--epochs", 1)
    result = CliRunner().invoke(app, list(map(str, ("run", *scratch, "-d", boards, "-o", output, *WORDS))))
    assert result.exit_code == 0, result.stderr
    assert "input.augmentation light is for images: none for arrays" in result.stderr
    return output


def test_a_network_of_arrays_learns_and_says_so_in_its_recipe(run: Path) -> None:
    text = (run / "recipe.yaml").read_text()
    assert "channels: array" in text and "augmentation: none" in text


@pytest.mark.slow
def test_arrays_pass_through_every_command(
    cli: Cli, run: Path, boards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert "augmentation: none" in (run / "recipe.yaml").read_text()
    assert "data:image/jpeg" in (run / "report.html").read_text()  # a picture of each array

    after = tmp_path / "after"  # the run is a backbone: its features are kept, its head solved
    solved = ("--strategy", "freeze", "--set", "strategy.features=last")
    assert cli("run", "-b", run, "-d", boards, "-o", after, *solved, *WORDS).exit_code == 0
    assert json.loads((after / "metrics.json").read_text())["accuracy"] >= 0.5

    table = tmp_path / "p.csv"
    assert cli("predict", run, boards, "-o", table).exit_code == 0
    found = pd.read_csv(table)
    assert len(found) == 12
    predictor = finetune.load(run)
    planes = np.load(boards / "left" / "1.npy")
    for one in (predictor.predict(boards / "left" / "1.npy"), predictor.predict(planes)):
        row = found[found["path"] == "left/1.npy"].iloc[0]
        assert one.probabilities["left"] == pytest.approx(row["prob_left"], abs=1e-5)
    with torch.inference_mode():
        logits = predictor.network(torch.from_numpy(planes.astype(np.float32))[None])
    expected = (logits / predictor.card.temperature).softmax(1)[0, 0].item()
    assert expected == pytest.approx(row["prob_left"], abs=1e-5)

    assert (
        cli("extract", "-b", run, "-d", boards, "-o", tmp_path / "f.csv", "-l", "last", *WORDS).exit_code == 0
    )
    assert len(pd.read_csv(tmp_path / "f.csv")) == 12
    assert cli("check", "--data", boards, "-o", tmp_path / "check").exit_code == 0
    judged = cli("evaluate", run, "-d", boards, "--split", "all", "--allow-leaks", "-o", tmp_path / "judged")
    assert judged.exit_code == 0, judged.stderr


@pytest.mark.slow
def test_an_exported_network_of_arrays_is_proved(cli: Cli, run: Path, tmp_path: Path) -> None:
    result = cli("export", run, "-o", tmp_path / "timm")
    assert result.exit_code == 0 and "only finetune can load alphago_policy_128" in result.stderr
    refused = cli("export", run, "--format", "onnx", "--with-preprocessing", "nchw", "-o", tmp_path / "onnx")
    assert refused.exit_code == 2 and "takes no 8-bit RGB images" in refused.stderr


@pytest.mark.slow
def test_what_draws_on_images_refuses_arrays(cli: Cli, run: Path, boards: Path, tmp_path: Path) -> None:
    for words in (("cam", run, "-d", boards), ("class", run), ("saliency", run, "-d", boards)):
        result = cli("explain", *words, "-o", tmp_path / words[0])
        assert result.exit_code == 2 and "takes arrays" in result.stderr, result.stderr
    crops = cli("predict", run, boards, "--crops", 5, "-o", tmp_path / "p.csv")
    assert crops.exit_code == 2 and "takes no photographs, and its images have one view" in crops.stderr


def test_images_for_a_network_of_arrays_are_refused_before_its_weights_are_fetched(
    cli: Cli, boards: Path, image_folder: Path, tmp_path: Path
) -> None:
    first = cli("run", "-b", "resnet50", "-d", boards, "-o", tmp_path / "a", *WORDS)
    assert first.exit_code == 65 and "holds arrays of 48 x 19 x 19 values, and timm/resnet50" in first.stderr
    second = cli(
        "run", "-b", "alphago_policy", "-s", "scratch", "-d", image_folder, "-o", tmp_path / "b", *WORDS
    )
    assert second.exit_code == 65 and "takes arrays (.npy, .npz) of 48 x 19 x 19 values" in second.stderr
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
