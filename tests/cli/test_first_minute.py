"""The first minute: a real result without a data folder, a named backbone or a network connection."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from finetune.features import network as default_backbone
from finetune.recipe import load_recipe
from pretrained.catalog import find_card
from pretrained.default_backbone import DefaultChoice, choose_best
from tests.conftest import Cli

BEST = choose_best(on_gpu=False).best
DEFAULT = BEST.card.name
"""That of finetune's own package, or a larger one where its package is installed, or one in a cache."""


def run_digits(cli: Cli, run: Path) -> str:
    words = ("run", "--data", "sample:digits", "--strategy", "freeze", "--set", "strategy.features=all")
    done = cli(*words, "--img-size", 32, "--output", run)
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def test_digits_without_a_folder_and_a_backbone(cli: Cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = run_digits(cli, run)
    assert (
        f"no backbone was named: {DEFAULT}, the best whose weights are on this machine ({BEST.accuracy:.1f} %"
        in said
    )
    assert "report.html" in said
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    assert (metrics["num_train"], metrics["num_samples"]) == (1438, 359)
    assert metrics["accuracy"] > 0.9
    assert "shorter side" not in said, "they are as small as they are"
    recipe = load_recipe(str(run / "recipe.yaml"))
    assert (recipe.backbone.name, recipe.data.path) == (DEFAULT, "sample:digits")
    assert f"The initial weights are those of `{DEFAULT}` (apache-2.0" in (
        run / "model" / "README.md"
    ).read_text("utf-8")


@pytest.mark.slow
def test_commands_on_a_run_of_the_digits_find_them(cli: Cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_digits(cli, run)
    assert cli("evaluate", run, "--output", tmp_path / "judged").exit_code == 0
    assert cli("predict", run, "sample:digits", "--output", tmp_path / "all.csv").exit_code == 0
    assert len((tmp_path / "all.csv").read_text("utf-8").splitlines()) == 1798


@pytest.mark.slow
def test_a_resumed_run_keeps_its_backbone(
    cli: Cli, tmp_path: Path, image_folder: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("run", "--data", image_folder, "--strategy", "freeze", "--output", tmp_path / "run")
    assert cli(*words, "--backbone", tiny, "--epochs", 1).exit_code == 0
    monkeypatch.setattr(default_backbone, "choose_best", lambda _: pytest.fail("chosen anew"))
    done = cli(*words, "--epochs", 2)
    assert done.exit_code == 0, done.output
    assert load_recipe(str(tmp_path / "run" / "recipe.yaml")).backbone.name == str(tiny)


@pytest.mark.slow
def test_a_resumed_run_keeps_its_weights(cli: Cli, tmp_path: Path, image_folder: Path, tiny: Path) -> None:
    words = ("run", "--data", image_folder, "--strategy", "freeze", "--output", tmp_path / "run")
    file = tmp_path / "others.safetensors"
    state = {name: tensor + 0.01 for name, tensor in load_file(tiny / "model.safetensors").items()}
    save_file(state, file)
    assert cli(*words, "--backbone", tiny, "--weights", file, "--epochs", 1).exit_code == 0
    done = cli(*words, "--epochs", 2)
    assert done.exit_code == 0, done.output
    assert load_recipe(str(tmp_path / "run" / "recipe.yaml")).backbone.weights == str(file)


@pytest.mark.slow
def test_a_series_has_one_backbone(
    cli: Cli, tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backbone stays the same, even if better weights are downloaded meanwhile."""
    choices = iter([choose_best(False), *[None] * 5])
    monkeypatch.setattr(default_backbone, "choose_best", lambda _: next(choices))
    words = ("run", "--data", image_folder, "--strategy", "freeze", "--epochs", 1, "--repeats", 2)
    done = cli(*words, "--output", tmp_path / "series")
    assert done.exit_code == 0, done.output
    names = [load_recipe(str(path)).backbone.name for path in sorted(tmp_path.glob("series/*/recipe.yaml"))]
    assert names == [DEFAULT, DEFAULT]


def test_random_weights_need_a_name(cli: Cli, image_folder: Path) -> None:
    done = cli("run", "--data", image_folder, "--strategy", "scratch")
    assert done.exit_code == 2
    assert "no backbone was named" in done.output


@pytest.mark.slow
def test_larger_backbones_that_were_not_chosen_are_named(
    cli: Cli, tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = tuple(
        (find_card(f"timm/{name}"), "large")
        for name in ("vgg16", "vgg19", "resnet152", "beit_base_patch16_224")
    )
    monkeypatch.setattr(
        default_backbone, "choose_best", lambda _: DefaultChoice(choose_best(False).best, others)
    )
    done = cli(
        "run", "--data", image_folder, "--strategy", "freeze", "--epochs", 1, "--output", tmp_path / "run"
    )
    said = " ".join(done.output.split())
    assert "also on this machine: timm/vgg16" in said and "1 more" in said
    assert "finetune pull" not in said


def test_missing_data_are_reported_before_a_backbone_is_searched(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(default_backbone, "choose_best", lambda _: pytest.fail("looked for weights"))
    done = cli("run", "--strategy", "auto")
    assert done.exit_code == 2
    assert "no data was named" in done.output


def test_weights_belong_to_a_backbone(cli: Cli, image_folder: Path, tiny: Path) -> None:
    done = cli("run", "--data", image_folder, "--weights", tiny)
    assert done.exit_code == 2
    assert "no backbone was named" in done.output
    assert "--backbone NAME" in done.output


@pytest.mark.slow
def test_features_without_a_backbone(cli: Cli, tmp_path: Path, image_folder: Path) -> None:
    done = cli("extract", "--data", image_folder, "--layers", "last", "--output", tmp_path / "features")
    assert done.exit_code == 0, done.output
    assert DEFAULT in done.output


def test_an_unknown_sample_is_refused(cli: Cli, tmp_path: Path) -> None:
    done = cli("run", "--data", "sample:cats", "--output", tmp_path / "run")
    assert done.exit_code == 2
    assert "sample:digits" in done.output
