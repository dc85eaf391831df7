"""The recipes of published networks, from the command line: one epoch on a few images like those of CIFAR."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from torch import nn
from typer.testing import CliRunner

from finetune.cli.app import app
from finetune.recipe import load_recipe
from pretrained.backbone import load_backbone
from pretrained.catalog import find_card
from tests.conftest import COLOURS, Cli, MakeOnce, draw
from tests.sweeps import slow_except

SIZE = (32, 32)
SCRATCH: Mapping[str, tuple[object, ...]] = {
    "cifar-resnet": (),
    "wide-resnet": (),
    "densenet": ("--backbone", "cifar_densenet_40_12"),
    "shake-shake": (),
    "resnet": ("--img-size", 32),
    "alexnet": ("--backbone", "alexnet_2012_without_67", "--img-size", 67),
    "vgg": ("--backbone", "timm/vgg11", "--set", "strategy.head=drop_fc", "--img-size", 32),
}
"""The smallest network of each family, and what makes it small."""


def draw_images(root: Path, colours: Mapping[str, tuple[int, int, int]]) -> None:
    for part, first, count in (("train", 0, 4), ("val", 1000, 2)):
        for position, (name, colour) in enumerate(colours.items()):
            for number in range(first + 100 * position, first + 100 * position + count):
                draw(root / part / name / f"{number:04}.png", colour, seed=number, size=SIZE)


@pytest.fixture(scope="session")
def small_images(make_once: MakeOnce) -> Path:
    return make_once("small-images", lambda root: draw_images(root, COLOURS))


@pytest.fixture(scope="session")
def other_images(make_once: MakeOnce) -> Path:
    colours = {"light": (220, 220, 210), "dark": (30, 30, 35)}
    return make_once("other-small-images", lambda root: draw_images(root, colours))


QUICK = ("--epochs", 1, "--workers", 0, "--json")
TrainedRun = Callable[[str], Path]


@pytest.fixture(scope="session")
def trained_run(make_once: MakeOnce, small_images: Path) -> TrainedRun:
    """``trained_run("densenet")`` is the folder of a run of that recipe, made once a session. Read only."""

    def make(recipe: str, folder: Path) -> None:
        words = ("--recipe", recipe, *SCRATCH[recipe], "--data", small_images, "--strategy", "scratch")
        result = CliRunner().invoke(app, [str(word) for word in ("run", *words, *QUICK, "-o", folder)])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["num_samples"] == 6

    return lambda recipe: make_once(f"recipe-{recipe}", lambda folder: make(recipe, folder))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", slow_except(["cifar-resnet"], SCRATCH))
def test_a_recipe_trains_its_family_from_random_weights(trained_run: TrainedRun, recipe: str) -> None:
    saved, published = load_recipe(str(trained_run(recipe) / "recipe.yaml")), load_recipe(recipe)
    decided = {"epochs", "precision", "channels_last"}
    assert saved.training.model_dump(exclude=decided) == published.training.model_dump(exclude=decided)
    assert saved.input.augmentation == published.input.augmentation


@pytest.mark.sample(1)
@pytest.mark.parametrize("strategy", ["freeze", "top", "full"])
def test_what_a_recipe_trained_is_a_backbone(
    cli: Cli, trained_run: TrainedRun, other_images: Path, tmp_path: Path, strategy: str
) -> None:
    words = ("-b", trained_run("cifar-resnet"), "-d", other_images, "-s", strategy, *QUICK)
    result = cli("run", *words, "-o", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "2 replaced (the head: head.fc.weight, head.fc.bias), 0 missing" in result.stderr
    assert json.loads(result.stdout)["num_samples"] == 4


# --- dropout of a published network --------------------------------------------------------------

WITH_DROPOUT = ("-b", "cifar_fractalnet_thin_c1", "-s", "scratch", "--set", "input.augmentation=none", *QUICK)


def rate_of(run: Path) -> tuple[float, float]:
    """The rate in a run's recipe, and that of the network which its model builds."""
    card = find_card(str(run))
    backbone = load_backbone(card, classes=card.label_names, head="keep")
    layers = [layer.p for layer in backbone.network.modules() if isinstance(layer, nn.Dropout)]
    assert backbone.card.dropout == max(layers)
    return load_recipe(str(run / "recipe.yaml")).strategy.dropout, max(layers)


def test_an_exported_network_has_its_published_dropout(cli: Cli, small_images: Path, tmp_path: Path) -> None:
    result = cli("run", *WITH_DROPOUT, "-d", small_images, "-o", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert rate_of(tmp_path / "run") == (0.4, 0.4)


@pytest.mark.slow
def test_a_recipe_that_was_saved_with_no_dropout_goes_on_without(
    cli: Cli, small_images: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = (*WITH_DROPOUT, "-d", small_images, "-o", run)
    assert cli("run", *words, "--set", "strategy.dropout=0.0").exit_code == 0
    refused = cli("run", *words)
    assert "it holds another run (strategy.dropout: 0.0 -> 0.4)" in refused.stderr
    result = cli("run", "--recipe", run / "recipe.yaml", "--epochs", 2, "-o", run)
    assert result.exit_code == 0, result.output
    assert "resuming at epoch 2" in result.stderr
    assert rate_of(run) == (0.0, 0.0)
