"""Images in full depth and of other channels than RGB, from training to the export."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

import finetune
from finetune.errors import ExitCode
from finetune.recipe import load_recipe
from tests.conftest import QUICK_RUN, Cli

STEP = 65535 // 255
"""Numbers of 16 bits that become one level of 8 bits."""


def draw(label: str, generator: np.random.Generator) -> NDArray[np.uint16]:
    """A grey image whose class is in stripes below a level of 8 bits, under black and white squares."""
    stripes = (np.arange(32) + generator.integers(0, 8)) // 4 % 2 * 200 - 100
    pixels = np.full((32, 32), 117 * STEP, dtype=np.int64)
    pixels += stripes[None, :] if label == "down" else stripes[:, None]
    for value in (0, 65535):
        top, left = generator.integers(0, 27, 2)
        pixels[top : top + 5, left : left + 5] = value
    return pixels.astype(np.uint16)


@pytest.fixture(scope="session")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, generator = tmp_path_factory.mktemp("stripes"), np.random.default_rng(0)
    for label in ("across", "down"):
        for split, number in {"train": 24, "val": 16}.items():
            (folder / split / label).mkdir(parents=True)
            for index in range(number):
                Image.fromarray(draw(label, generator)).save(folder / split / label / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def grey(stripes: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a network with one channel."""
    from finetune.cli.app import app

    output = tmp_path_factory.mktemp("grey") / "run"
    words = ("run", "-b", tiny, "-d", stripes, "--channels", "grey", "-s", "full", *QUICK_RUN, "-o", output)
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == 0, result.output
    return output


@pytest.mark.parametrize(("channels", "sees_all"), [("rgb", False), ("grey", True), ("3", True)])
def test_eight_bits_cannot_tell_what_sixteen_can(
    cli: Cli, stripes: Path, tmp_path: Path, channels: str, sees_all: bool
) -> None:
    words = ("run", "-b", "tf_efficientnet_lite0", "-d", stripes, "--channels", channels, "--img-size", 64)
    solved = ("-s", "freeze", "--set", "strategy.features=last", "--json")
    result = cli(*words, *QUICK_RUN, *solved, "-o", tmp_path / "run")
    assert result.exit_code == 0, result.output
    accuracy = json.loads(result.stdout)["accuracy"]
    assert accuracy >= 0.9 if sees_all else accuracy <= 0.75


@pytest.mark.slow
def test_grey_images_pass_through_every_command(cli: Cli, stripes: Path, tiny: Path, tmp_path: Path) -> None:
    run, words = tmp_path / "run", ("-d", stripes, "--channels", "grey", *QUICK_RUN)
    result = cli("run", "-b", tiny, "-s", "full", "--epochs", 2, *words, "-o", run)
    assert result.exit_code == 0, result.output
    assert "its channels are summed, as timm does" in result.stderr
    judged = pd.read_csv(run / "predictions.csv").set_index("path")["prob_down"]

    config = json.loads((run / "model" / "config.json").read_text())
    assert (config["model_args"]["in_chans"], config["finetune"]["channels"]) == (1, 1)
    assert len(config["pretrained_cfg"]["mean"]) == 1
    for kind in ("timm", "onnx"):
        result = cli("export", run, "--format", kind, "-o", tmp_path / kind, "--json")
        assert result.exit_code == 0 and json.loads(result.stdout)["top1_identical"], result.output
    steps = json.loads((tmp_path / "onnx" / "preprocessing.json").read_text())["before_the_graph"]
    assert steps[0] == {"step": "decode", "channels": 1, "numbers": "of the file", "upright": True}
    assert [step["step"] for step in steps[1:]] == ["resize", "center_crop", "normalize"]

    table = tmp_path / "predictions.csv"
    assert cli("predict", run, stripes / "val", "-o", table).exit_code == 0
    again = pd.read_csv(table).set_index("path")["prob_down"].rename(lambda path: f"val/{path}")
    assert np.allclose(again.loc[judged.index], judged, atol=1e-5)
    predictor = finetune.load(run)
    first = judged.index[0]
    for given in (stripes / first, Image.open(stripes / first), np.asarray(Image.open(stripes / first))):
        assert predictor.predict(given).probabilities["down"] == pytest.approx(judged[first], abs=1e-5)

    before = (run / "model" / "model.safetensors").read_bytes()
    finished = cli("run", "-b", tiny, "-s", "full", "--epochs", 2, *words, "-o", tmp_path / "same")
    assert finished.exit_code == 0
    assert (tmp_path / "same" / "model" / "model.safetensors").read_bytes() == before
    more = cli(
        "run", "-b", run, "-d", stripes, *QUICK_RUN, "-s", "freeze", "--epochs", 1, "-o", tmp_path / "more"
    )
    assert more.exit_code == 0, more.output  # its channels are known
    assert "channels: 1" in (tmp_path / "more" / "recipe.yaml").read_text()

    for command in ("extract", "probe", "advise"):
        result = cli(command, "-b", tiny, *words[:4], "--device", "cpu", "-o", tmp_path / command)
        assert result.exit_code == 0, result.output
    assert "data:image/jpeg" in (run / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        *(("cam",), ("saliency",), ("localise",), ("maps",), ("top",), ("invariance",), ("ablate",)),
        *(("deconv",), ("filters",), ("class", "--class", "down"), ("receptive-field",)),
    ],
    ids=lambda words: words[0],
)
def test_every_explanation_draws_on_grey(
    cli: Cli, grey: Path, stripes: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    images = () if words[0] in ("filters", "class", "receptive-field") else ("--data", stripes / "val")
    result = cli("explain", words[0], grey, *words[1:], *images, "--device", "cpu", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert list((tmp_path / "out").glob("*.png"))


def test_images_of_other_depth_than_the_models_are_said(
    cli: Cli, grey: Path, stripes: Path, tmp_path: Path
) -> None:
    shallow = tmp_path / "shallow" / "across"
    shallow.mkdir(parents=True)
    for index, path in enumerate(sorted((stripes / "val" / "across").iterdir())[:4]):
        levels = np.asarray(Image.open(path)) // STEP
        Image.fromarray(levels.astype(np.uint8)).save(shallow / f"{index}.png")
    said = "these images of 8 bits hold numbers from 0 to 255, and those that the model was trained on"
    told = cli("predict", grey, shallow, "-o", tmp_path / "shallow.csv")
    assert told.exit_code == 0 and said in " ".join(told.stderr.split()), told.stderr
    told = cli("evaluate", grey, "-d", tmp_path / "shallow", "-o", tmp_path / "shallow-metrics")
    assert told.exit_code == 0 and said in " ".join(told.stderr.split()), told.stderr
    for words in (("predict", grey, stripes / "val"), ("evaluate", grey)):
        told = cli(*words, "-o", tmp_path / f"{words[0]}-own.csv")
        assert told.exit_code == 0 and "hold numbers from" not in told.stderr


@pytest.mark.slow
def test_the_service_predicts_pixels_files_and_arrays(grey: Path, stripes: Path, tmp_path: Path) -> None:
    """As its process for a model does."""
    from finetune.service.predictions.model_process import _Model

    model = _Model(grey / "model", tmp_path)
    file = next((stripes / "val" / "down").iterdir())
    array = io.BytesIO()
    np.save(array, np.asarray(Image.open(file)))
    header = {"shapes": [None, None, [40, 40]], "wants_map": [True] * 3}
    first, second, third = model.answer(header, [file.read_bytes(), array.getvalue(), bytes(4800)])["answers"]
    assert first["probabilities"] == pytest.approx(second["probabilities"], abs=1e-6)
    assert sum(third["probabilities"]) == pytest.approx(1)


def test_explanations_of_channels_that_nobody_measured_are_refused(
    cli: Cli, stripes: Path, tiny: Path, tmp_path: Path
) -> None:
    words = ("explain", "cam", tiny, "--data", stripes / "val", "--channels", "grey", "-o", tmp_path / "out")
    result = cli(*words)
    assert result.exit_code == ExitCode.USAGE
    assert "was not trained on such channels, whose mean and deviation are unknown" in result.stderr


@pytest.mark.slow
def test_a_lost_image_does_not_change_the_statistics_of_a_run(
    cli: Cli, stripes: Path, tiny: Path, tmp_path: Path
) -> None:
    """The split is drawn anew without it; what was measured at first stays."""
    data, run = tmp_path / "data", tmp_path / "run"
    for label in ("across", "down"):
        shutil.copytree(stripes / "train" / label, data / label)
    words = ("run", "-b", tiny, "-d", data, "--channels", "grey", "-s", "full", *QUICK_RUN, "-o", run)
    assert cli(*words).exit_code == 0
    before = load_recipe(str(run / "recipe.yaml")).input
    (data / "down" / "0.png").unlink()
    result = cli(*words[:-4], "--epochs", 6, *words[-4:], "--allow-changed")
    assert "input.mean" not in result.stderr, result.stderr
    assert load_recipe(str(run / "recipe.yaml")).input == before


@pytest.mark.slow
def test_arrays_have_as_many_channels_as_their_axis(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    for label in ("across", "down"):
        (tmp_path / "five" / label).mkdir(parents=True)
        for index in range(12):
            planes = generator.integers(0, 1000, (32, 32, 5)).astype(np.float32)
            planes[..., 3] = draw(label, generator)
            np.save(tmp_path / "five" / label / f"{index}.npy", planes)
    words = ("run", "-b", tiny, "-d", tmp_path / "five", "-s", "full", "--epochs", 1)
    quick = ("--workers", 0, "--device", "cpu", "--augmentation", "heavy")
    result = cli(*words, *quick, "-o", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "its channels are repeated to 5, as timm does" in result.stderr
    assert "input.augmentation heavy is for RGB (RandAugment, random erasing): light for" in result.stderr
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "channels: 5" in recipe and "augmentation: light" in recipe
    image = tmp_path / "five" / "down" / "0.npy"
    for words in (("advise",), ("probe", "--per-class", 5), ("extract",), ("map",), ("similar", image)):
        data = ("-d", tmp_path / "five", "--device", "cpu", "-o", tmp_path / words[0])
        result = cli(*words, "-b", tiny, *data)
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--channels", 5), ExitCode.DATA, "it holds images (grey or RGB), and local-dir"),
        (("--channels", 17), ExitCode.USAGE, "it must be a whole number of at least 1 and at most 16"),
        (
            ("--channels", "grey", "--set", "input.interpolation=lanczos"),
            ExitCode.USAGE,
            "it is for 8-bit RGB only",
        ),
        (("--channels", "infrared"), ExitCode.USAGE, "rgb, grey, array or auto"),
        (
            ("--channels", "grey", "--set", "input.mean=[1, 2]"),
            ExitCode.USAGE,
            "input.mean: it has 2 values, and the images have 1 channel",
        ),
        (
            ("-b", "alphago_policy", "--channels", "grey", "-s", "scratch"),
            ExitCode.USAGE,
            "the network takes arrays",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    cli: Cli, stripes: Path, tiny: Path, words: tuple[str, ...], code: int, said: str
) -> None:
    backbone = () if "-b" in words else ("-b", tiny)
    result = cli("run", "-d", stripes, *backbone, *words)
    assert (result.exit_code, said in result.stderr) == (code, True), result.stderr
