"""``finetune explain`` on layers and units: what is written, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import QUICK_RUN, Cli, MakeOnce, draw_folder
from tests.explain.places import save_random

WRITTEN = {
    "filters": ({"filters.png", "filters.csv", "filters.npz"}, ()),
    "maps": ({"maps-1.png", "maps-2.png", "maps.csv", "maps.npz"}, ("--layer", "layer2")),
    "top": ({"top-layer1.png", "top-layer2.png", "top.csv", "top.npz"}, ("--layer", "layer1,layer2")),
    "deconv": ({"deconv.png", "deconv.csv", "deconv.npz"}, ("--layer", "layer2", "--maps", "3,0")),
    "receptive-field": (
        {"receptive-fields.png", "receptive-fields.csv", "receptive-fields.npz"},
        ("--layer", "layer1,layer2"),
    ),
}


@pytest.fixture(scope="session")
def two_images(make_once: MakeOnce) -> Path:
    return make_once("two images", lambda folder: draw_folder(folder, {"red": 1, "blue": 1}))


@pytest.fixture(scope="session")
def kept_run(make_once: MakeOnce, tiny: Path, image_folder: Path) -> Path:
    """A run over five epochs that kept the weights of two of them."""
    from typer.testing import CliRunner

    from finetune.cli.app import app

    def make(folder: Path) -> None:
        words = ["run", "-b", tiny, "-d", image_folder, "-o", folder / "run", "-s", "full", *QUICK_RUN]
        result = CliRunner().invoke(app, [*map(str, words), "--set", "training.keep_epochs=[1,3,9]"])
        assert result.exit_code == 0, result.output

    return make_once("kept run", make) / "run"


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.sample(2)
@pytest.mark.parametrize("method", WRITTEN)
def test_a_command_writes_pictures_numbers_and_a_record(
    cli: Cli, method: str, tiny: Path, two_images: Path, tmp_path: Path
) -> None:
    files, words = WRITTEN[method]
    result = cli("explain", method, tiny, two_images, *words, "--output", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == files | {"explain.json"}
    record = json.loads((tmp_path / "out" / "explain.json").read_text())
    assert json.loads(result.stdout) == {"output": str(tmp_path / "out"), **record}
    assert record["method"] == method and set(record["versions"]) == {
        "finetune",
        "torch",
        "torchvision",
        "timm",
    }
    for name in files:
        if name.endswith(".png"):
            with Image.open(tmp_path / "out" / name) as picture:
                assert np.asarray(picture).std() > 5  # something is drawn


def test_top_names_the_images_that_excite_a_map_most(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    words = ("--data", image_folder / "val", "--layer", "layer1", "--maps", "5,2")
    assert cli("explain", "top", tiny, *words, "--output", tmp_path / "out").exit_code == 0
    rows, arrays = read_csv(tmp_path / "out" / "top.csv"), np.load(tmp_path / "out" / "top.npz")
    assert [row["map"] for row in rows] == ["5"] * 9 + ["2"] * 9
    assert [float(row["activation"]) for row in rows[:9]] == pytest.approx(
        arrays["layer1.values"][:, 5], rel=1e-6
    )
    assert [row["path"] for row in rows[:9]] == list(arrays["paths"][arrays["layer1.images"][:, 5]])
    assert all(0 <= int(row["top"]) < int(row["bottom"]) <= 32 for row in rows)


@pytest.mark.slow
def test_kept_features_give_what_the_images_give(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    """Data go through the cache: the second command computes nothing but the units of the maps it shows."""
    words, folder = ("--layer", "layer1", "--maps", "5,2"), image_folder / "val"
    said = {}
    for name, given in (("direct", (folder,)), ("kept", ("--data", folder)), ("again", ("--data", folder))):
        result = cli("explain", "top", tiny, *given, *words, "--output", tmp_path / name)
        assert result.exit_code == 0, result.output
        said[name] = read_csv(tmp_path / name / "top.csv")
    assert said["kept"] == said["again"] and len(said["kept"]) == 18
    for one, other in zip(said["direct"], said["kept"], strict=True):
        assert float(one.pop("activation")) == pytest.approx(float(other.pop("activation")), rel=1e-4)
        assert Path(one.pop("path")).name == Path(other.pop("path")).name
        assert one == other


def test_strong_maps_need_not_be_those_that_count(
    cli: Cli, tiny: Path, two_images: Path, tmp_path: Path
) -> None:
    words = ("--layer", "layer2", "--class", "3")
    assert cli("explain", "maps", tiny, two_images, *words, "--output", tmp_path / "out").exit_code == 0
    rows = read_csv(tmp_path / "out" / "maps.csv")
    record = json.loads((tmp_path / "out" / "explain.json").read_text())
    assert {row["class"] for row in rows} == {"3"} and -1 <= record["agreement"] < 1
    assert len(rows) == 2 * record["num_maps"]
    first = rows[: record["num_maps"]]
    for name in ("strength", "contribution"):
        best = max(first, key=lambda row: float(row[name]))
        assert best[f"{name}_rank"] == "1"


@pytest.mark.slow
def test_evolution_shows_the_epochs_that_were_kept(cli: Cli, kept_run: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in (kept_run / "epochs").iterdir()) == [
        "epoch-000001.safetensors",
        "epoch-000003.safetensors",
    ]
    result = cli("explain", "evolution", kept_run, "--layer", "layer2", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    rows = read_csv(tmp_path / "out" / "evolution.csv")
    record = json.loads((tmp_path / "out" / "explain.json").read_text())
    assert record["epochs"] == [1, 3] and len(record["maps"]) == 4 and record["no_projections"] is None
    assert {row["time"] for row in rows} == {"epoch 1", "epoch 3", "the result"}
    by_time = {
        time: [float(row["activation"]) for row in rows if row["time"] == time]
        for time in ("epoch 1", "epoch 3", "the result")
    }
    assert len({tuple(values) for values in by_time.values()}) == 3  # training changed them


@pytest.mark.slow
def test_kept_weights_are_those_of_their_epoch(
    cli: Cli, tiny: Path, image_folder: Path, kept_run: Path, tmp_path: Path
) -> None:
    """A run of one epoch ends with what a longer one kept of its first, at a constant learning rate."""
    words = ("run", "-b", tiny, "-d", image_folder, "-s", "full", *QUICK_RUN, "--epochs", 1)
    constant = ("--set", "training.schedule=constant")
    assert cli(*words, *constant, "-o", tmp_path / "one").exit_code == 0
    longer = ("--epochs", 2, "--set", "training.keep_epochs=[1]", "-o", tmp_path / "two")
    assert cli(*words, *constant, *longer).exit_code == 0
    kept = load_file(tmp_path / "two" / "epochs" / "epoch-000001.safetensors")
    alone = load_file(tmp_path / "one" / "model" / "model.safetensors")
    body = [name for name in kept if not name.startswith("fc.")]  # the head is for standardised features
    assert len(body) > 50 and all(torch.equal(kept[name], alone[name]) for name in body)


def test_images_that_cannot_be_read_are_listed(
    cli: Cli, tiny: Path, two_images: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    images = (two_images, tmp_path / "bad.jpg")
    result = cli("explain", "top", tiny, *images, "--layer", "layer1", "--output", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["num_images"] == 2 and json.loads(result.stdout)["num_bad"] == 1
    assert [row["path"] for row in read_csv(tmp_path / "out" / "bad_images.csv")] == [
        str(tmp_path / "bad.jpg")
    ]


def test_a_deeper_convolution_shows_norms_and_what_excites_it(
    cli: Cli, tiny: Path, two_images: Path, tmp_path: Path
) -> None:
    words = ("--layer", "layer1.0.conv2")
    assert cli("explain", "filters", tiny, two_images, *words, "--output", tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / "projections.png").is_file()
    arrays = np.load(tmp_path / "out" / "filters.npz")
    assert np.allclose(np.sqrt((arrays["kernels"] ** 2).sum(axis=(2, 3))), arrays["norms"], atol=1e-5)


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "an unknown layer": (("top", "--layer", "layre1"), "did you mean 'layer1'"),
    "a layer that is no map": (("top", "--layer", "pre_logits"), "it is no map"),
    "a pattern of several": (("deconv", "--layer", "layer*"), "it matches"),
    "a map that is not there": (("top", "--layer", "layer1", "--maps", "99999"), "numbered from 0"),
    "no number": (("deconv", "--maps", "3,x"), "'x' is not the number of a feature map"),
    "an unknown method": (("deconv", "--method", "guide"), "did you mean 'guided'"),
    "an unknown class": (("maps", "--class", "bicycle"), "no such class"),
    "a filter of what has none": (("filters", "--layer", "layer1"), "it is no convolution"),
    "an unknown convolution": (("filters", "--layer", "layer1.0.conv9"), "did you mean 'layer1.0.conv"),
    "evolution of what is no run": (("evolution",), "it is not a run folder"),
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_refused_with_the_fix(
    cli: Cli, case: str, tiny: Path, two_images: Path, tmp_path: Path
) -> None:
    (method, *words), said = REFUSED[case]
    result = cli("explain", method, tiny, two_images, *words, "--output", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert said in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.sample(3)
@pytest.mark.parametrize("method", [*WRITTEN, "evolution"])
def test_output_that_exists_is_refused(
    cli: Cli, method: str, tiny: Path, kept_run: Path, two_images: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    model = kept_run if method == "evolution" else tiny
    result = cli("explain", method, model, two_images, "--output", tmp_path)
    assert result.exit_code == 2 and "the folder is not empty" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("method", ["maps", "top", "deconv"])
def test_images_must_be_named(cli: Cli, method: str, tiny: Path, tmp_path: Path) -> None:
    result = cli("explain", method, tiny, "--output", tmp_path / "out")
    assert result.exit_code == 2 and "no images were named" in result.stderr


def test_evolution_says_how_weights_are_kept(
    cli: Cli, finished_run: Callable[[str], Path], tmp_path: Path
) -> None:
    result = cli("explain", "evolution", finished_run("full"), "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "--set training.keep_epochs=[1,2,5,10]" in result.stderr.replace("\n", " ")


def test_a_network_without_relu_is_refused(cli: Cli, two_images: Path, tmp_path: Path) -> None:
    model = save_random("test_efficientnet", tmp_path / "model", 64)
    result = cli("explain", "deconv", model, two_images, "--output", tmp_path / "out")
    assert result.exit_code == 2 and "silu" in result.stderr and "ReLU only" in result.stderr


def test_evolution_refuses_damaged_weights(cli: Cli, kept_run: Path, tmp_path: Path) -> None:
    shutil.copytree(kept_run, tmp_path / "run")
    (tmp_path / "run" / "epochs" / "epoch-000003.safetensors").write_bytes(b"damaged")
    result = cli("explain", "evolution", tmp_path / "run", "--layer", "layer1", "--output", tmp_path / "out")
    assert result.exit_code == 65 and "epoch-000003.safetensors" in result.stderr
    assert not (tmp_path / "out").exists()
