"""Images that are no squares: ``--img-size HEIGHTxWIDTH`` and ``--resize``, from training to the export."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from finetune.errors import ExitCode
from tests.conftest import QUICK_RUN, Cli


@pytest.fixture(scope="session")
def strips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy images, 120 x 40, whose class is the colour of both ends, which a centre crop cuts off."""
    folder, generator = tmp_path_factory.mktemp("strips"), np.random.default_rng(0)
    for name, colour in {"red": (220, 30, 30), "blue": (30, 30, 220)}.items():
        for split, number in {"train": 20, "val": 12}.items():
            (folder / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = np.full((40, 120, 3), generator.integers(60, 190, 3), dtype=np.uint8)
                pixels[:, :30] = pixels[:, 90:] = colour
                noise = generator.integers(-25, 25, pixels.shape)
                image = Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))
                image.save(folder / split / name / f"{index}.png")
    return folder


@pytest.mark.parametrize(
    ("words", "sees_all"),
    [
        (("--img-size", 32), False),
        (("--img-size", "32x96"), True),
        (("--img-size", 32, "--resize", "squash"), True),
        (("--img-size", 32, "--resize", "pad"), True),
    ],
)
def test_what_a_centre_crop_cuts_off_is_seen(
    cli: Cli, strips: Path, tiny: Path, tmp_path: Path, words: tuple[str | int, ...], sees_all: bool
) -> None:
    run = ("run", "-b", tiny, "-d", strips, "-s", "freeze", "--epochs", 8, *words, "--json")
    result = cli(*run, *QUICK_RUN, "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    accuracy = json.loads(result.stdout)["accuracy"]
    assert accuracy >= 0.95 if sees_all else accuracy <= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["timm", "onnx"])
def test_a_rectangle_is_exported_and_predicted(
    cli: Cli, strips: Path, tiny: Path, tmp_path: Path, kind: str
) -> None:
    words = ("--img-size", "32x96", "--resize", "pad", "-s", "full", "--epochs", 1)
    result = cli("run", "-b", tiny, "-d", strips, *words, *QUICK_RUN, "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    view = config["pretrained_cfg"]
    assert (view["input_size"], view["crop_mode"], view["crop_pct"]) == ([3, 32, 96], "border", 1.0)
    result = cli("export", tmp_path / "run", "--format", kind, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["top1_identical"]
    table = tmp_path / "predictions.csv"
    result = cli("predict", tmp_path / "run", strips / "val", "-o", table)
    assert result.exit_code == 0, result.output
    judged = pd.read_csv(tmp_path / "run" / "predictions.csv").set_index("path")["prob_red"]
    again = pd.read_csv(table).set_index("path")["prob_red"].rename(lambda path: f"val/{path}")
    assert np.allclose(again.loc[judged.index], judged, atol=1e-5)


def test_a_size_that_is_none_is_refused(cli: Cli, strips: Path, tiny: Path) -> None:
    for size in ("32x", "0x32", "32x96x3", "wide"):
        result = cli("run", "-b", tiny, "-d", strips, "--img-size", size)
        assert result.exit_code == ExitCode.USAGE
        assert "`input.img_size` is" in result.stderr and "two whole numbers of at least 16" in result.stderr
    result = cli("run", "-b", tiny, "-d", strips, "--resize", "border")
    assert "`input.resize` is 'border'; it must be crop, squash, pad or auto" in result.stderr


def test_a_network_of_squares_refuses_another_size(cli: Cli, strips: Path) -> None:
    result = cli("run", "-b", "torchvision/vit_b_16", "-d", strips, "-s", "scratch", "--img-size", "224x448")
    assert result.exit_code == ExitCode.USAGE
    assert "torchvision's vision transformers take squares only" in result.stderr
    result = cli("run", "-b", "test_vit", "-d", strips, "-s", "scratch", "--img-size", "160x100")
    assert result.exit_code == ExitCode.USAGE
    assert "its patches of 16 pixels do not divide 160x100 pixels: 4 % of the area" in result.stderr
    assert "Take --img-size 160x96 or 160x112." in result.stderr
