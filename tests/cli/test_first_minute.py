"""The first minute: no folder, no backbone, no network, and a real result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.job import default_backbone
from finetune.recipe import load_recipe
from pretrained.bundle import list_bundled
from tests.conftest import Cli

BUNDLED = f"finetune/{list_bundled()[0]}"


def test_digits_without_a_folder_and_a_backbone(cli: Cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = cli("run", "--data", "sample:digits", "--strategy", "freeze", "--epochs", 2, "--output", run)
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert f"no backbone was named: {BUNDLED}, which comes with the installation" in said
    assert "report.html" in said
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    assert (metrics["num_train"], metrics["num_samples"]) == (1438, 359)
    assert metrics["accuracy"] > 0.6  # features of random weights give as much as 0.5 here
    recipe = load_recipe(str(run / "recipe.yaml"))
    assert (recipe.backbone.name, recipe.data.path) == (BUNDLED, "sample:digits")
    assert f"Weights started from `{BUNDLED}` (apache-2.0" in (run / "model" / "README.md").read_text("utf-8")
    # What reads the run's pictures again finds them.
    assert cli("evaluate", run, "--output", tmp_path / "judged").exit_code == 0
    assert cli("predict", run, "sample:digits", "--output", tmp_path / "all.csv").exit_code == 0
    assert len((tmp_path / "all.csv").read_text("utf-8").splitlines()) == 1798


def test_a_run_that_was_begun_keeps_its_backbone(
    cli: Cli, tmp_path: Path, pictures: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("run", "--data", pictures, "--strategy", "freeze", "--output", tmp_path / "run")
    assert cli(*words, "--backbone", tiny, "--epochs", 1).exit_code == 0
    monkeypatch.setattr(default_backbone, "choose_best", lambda _: pytest.fail("chosen anew"))
    done = cli(*words, "--epochs", 2)
    assert done.exit_code == 0, done.output
    assert load_recipe(str(tmp_path / "run" / "recipe.yaml")).backbone.name == str(tiny)


def test_weights_belong_to_a_backbone(cli: Cli, pictures: Path, tiny: Path) -> None:
    done = cli("run", "--data", pictures, "--weights", tiny)
    assert done.exit_code == 2
    assert "no backbone was named" in done.output
    assert "--backbone NAME" in done.output


def test_features_without_a_backbone(cli: Cli, tmp_path: Path, pictures: Path) -> None:
    done = cli("extract", "--data", pictures, "--layers", "last", "--output", tmp_path / "features")
    assert done.exit_code == 0, done.output
    assert BUNDLED in done.output


def test_a_sample_that_there_is_not(cli: Cli, tmp_path: Path) -> None:
    done = cli("run", "--data", "sample:cats", "--output", tmp_path / "run")
    assert done.exit_code == 2
    assert "sample:digits" in done.output
