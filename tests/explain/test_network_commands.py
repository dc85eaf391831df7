"""``finetune explain`` on whole networks: what is written, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.explain.commands.class_image import _Drawn, _judge, _tile
from finetune.explain.invariance import AMOUNTS
from tests.conftest import COLOURS, Cli, FinishedRun, MakeOnce, draw_folder
from tests.sweeps import slow_except


@pytest.fixture(scope="session")
def two_images(make_once: MakeOnce) -> Path:
    return make_once("two images", lambda folder: draw_folder(folder, {"red": 1, "blue": 1}))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def explain(cli: Cli, folder: Path, method: str, *words: object) -> dict[str, object]:
    result = cli("explain", method, *words, "--output", folder, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads((folder / "explain.json").read_text())
    assert json.loads(result.stdout) == {"output": str(folder), **record}
    assert record["method"] == method and record["versions"]["finetune"]
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            assert np.asarray(picture).std() > 5  # something is drawn
    return record


@pytest.mark.slow
def test_a_run_of_few_classes_gets_images_of_all(cli: Cli, finished_run: FinishedRun, tmp_path: Path) -> None:
    record = explain(cli, tmp_path / "out", "class", finished_run("full"), "--seeds", 2)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "class-images.png",
        "class-images.csv",
        "class-images.npz",
        "explain.json",
    }
    assert record["checks"]["recognised"]["passed"] is True
    rows = read_csv(tmp_path / "out" / "class-images.csv")
    assert [row["class"] for row in rows] == [name for name in COLOURS for _ in range(2)]
    assert all(row["predicted"] == row["class"] for row in rows)
    assert all(float(row["score"]) > float(row["score_at_start"]) for row in rows)
    found = np.load(tmp_path / "out" / "class-images.npz")
    assert list(found["classes"]) == list(COLOURS)
    assert found["images"].dtype == np.uint8 and found["images"].shape == (3, 2, 3, 32, 32)


def test_an_image_that_is_taken_for_another_class_is_not_drawn() -> None:
    drawn = _Drawn(torch.zeros(3, 8, 8, dtype=torch.uint8), 1, 0, 1e-3, 0.5, 1.25, 0.4, 2)
    tile = _tile(drawn, ("ant", "bee", "fly"), 16)
    assert tile.image == "not shown: the network takes this image for fly"
    assert tuple(tile.lines) == ("bee", "score 0.5 to 1.2", "probability 0.400")
    assert not isinstance(_tile(replace(drawn, predicted=1), ("ant", "bee"), 16).image, str)
    judged = _judge([drawn, replace(drawn, predicted=1)])
    assert (judged["passed"], judged["num_right"], judged["num_images"]) == (False, 1, 2)


@pytest.mark.slow
def test_one_class_may_be_named(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    record = explain(cli, tmp_path / "out", "class", tiny, "--class", "7", "--seeds", 1)
    assert (record["classes"], record["seeds"], record["contrast"]) == (["7"], [0], 0.5)
    [row] = read_csv(tmp_path / "out" / "class-images.csv")
    assert float(row["lambda"]) > 0


@pytest.mark.slow
def test_responses_are_written_for_every_transformation(
    cli: Cli, tiny: Path, two_images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    record = explain(cli, out, "invariance", tiny, two_images, "--layer", "layer1,layer4")
    assert {path.name for path in out.iterdir()} == {
        "invariance.png",
        "invariance.csv",
        "invariance.npz",
        "explain.json",
    }
    assert (record["layers"], record["num_images"], record["num_bad"]) == (["layer1", "layer4"], 2, 0)
    rows, arrays = read_csv(out / "invariance.csv"), np.load(out / "invariance.npz")
    assert len(rows) == 3 * sum(map(len, AMOUNTS.values()))
    assert len(arrays["paths"]) == 2
    for kind, amounts in AMOUNTS.items():
        assert arrays[f"{kind}_distances"].shape == (2, 2, len(amounts))
        assert arrays[f"{kind}_probabilities"].shape == (2, len(amounts))


@pytest.mark.slow
def test_the_class_is_that_of_the_labels(
    cli: Cli, finished_run: FinishedRun, image_folder: Path, tmp_path: Path
) -> None:
    words = ("invariance", finished_run("full"), "--layer", "layer1")
    explain(cli, tmp_path / "labels", *words, "--data", image_folder)
    found = np.load(tmp_path / "labels" / "invariance.npz")
    assert len(found["paths"]) == 18, "the validation images"
    assert found["translation_probabilities"][:, 5].mean() > 0.5
    explain(cli, tmp_path / "wrong", *words, image_folder / "val" / "red", "--class", "blue")
    wrong = np.load(tmp_path / "wrong" / "invariance.npz")
    assert wrong["translation_probabilities"][:, 5].mean() < 0.5


def test_every_block_is_removed(cli: Cli, finished_run: FinishedRun, tmp_path: Path) -> None:
    """The run's own validation images are taken, and the complete network has the error of the run."""
    run = finished_run("full")
    record = explain(cli, tmp_path / "out", "ablate", run)
    metrics = json.loads((run / "metrics.json").read_text())
    assert record["error"] == pytest.approx(1 - metrics["accuracy"], abs=1e-6)
    assert (record["split"], record["num_images"]) == ("val", 18)
    rows = read_csv(tmp_path / "out" / "ablation.csv")
    assert [row["block"] for row in rows] == record["blocks"] and rows
    for row in rows:
        low, increase, high = (float(row[name]) for name in ("low", "increase", "high"))
        assert low <= increase <= high
        assert float(row["error"]) == pytest.approx(record["error"] + increase, abs=1e-5)


@pytest.mark.slow
def test_mistakes_are_refused(cli: Cli, tiny: Path, two_images: Path, tmp_path: Path) -> None:
    out = ("--output", tmp_path / "out")
    for words, code, said in (
        (("class", tiny, "--class", "elephant"), 2, "the model has no such class"),
        (("invariance", tiny, two_images, "--layer", "layer9"), 2, "did you mean"),
        (("invariance", tiny, two_images, "--layer", "layer1.*.*"), 2, "at most 7"),
        (("invariance", tiny), 2, "Add --data FOLDER"),
        (("ablate", tiny), 2, "Add --data FOLDER"),
        (("ablate", tiny, "--data", two_images), 65, "the model has no such class"),
        (("ablate", tiny, "--data", two_images / "red"), 65, "the images have no labels"),
    ):
        result = cli("explain", *words, *out)
        assert (result.exit_code, said in result.stderr) == (code, True), (words, result.stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_images_that_cannot_be_read_are_listed(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "images", {"red": 1})
    (folder / "red" / "broken.jpg").write_bytes(b"no image")
    record = explain(cli, tmp_path / "out", "invariance", tiny, folder, "--layer", "layer1")
    assert (record["num_images"], record["num_bad"]) == (1, 1)
    assert "broken.jpg" in (tmp_path / "out" / "bad_images.csv").read_text()


def test_mistakes_are_traced_to_training_images(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    """Red images that are labelled blue make red ones blue: they are named, and without them it is right."""
    data = tmp_path / "data"
    shutil.copytree(image_folder, data)
    wrong = sorted((data / "train/red").iterdir())[:-2]
    for file in wrong:
        file.rename(data / "train/blue" / f"wrong-{file.name}")
    words = ("-b", tiny, "-d", data, "-s", "freeze", "--set", "strategy.features=all", "--workers", 0)
    assert cli("run", *words, "-o", tmp_path / "run").exit_code == 0
    record = explain(cli, tmp_path / "out", "influence", tmp_path / "run")
    mistakes = [one for one in record["answers"] if (one["label"], one["predicted"]) == ("red", "blue")]
    assert mistakes
    rows = read_csv(tmp_path / "out/influence.csv")
    for one in mistakes:
        own = [row for row in rows if row["path"] == one["path"]]
        assert float(own[0]["change"]) < 0 and "wrong-" in own[0]["training_path"]
        named = one["changed_without"]
        assert named and sum("wrong-" in path for path in named) > len(named) / 2
    named = next(iter((data / "val/green").iterdir()))
    record = explain(cli, tmp_path / "one", "influence", tmp_path / "run", named)
    assert [one["predicted"] for one in record["answers"]] == ["green"]


UNEXPLAINED = ("trained", "no run", "other image", "data", "no mistake")


@pytest.mark.parametrize("wrong", slow_except(["trained"], UNEXPLAINED))
def test_influence_is_refused(
    cli: Cli, finished_run: FinishedRun, image_folder: Path, tiny: Path, tmp_path: Path, wrong: str
) -> None:
    run, words, said = finished_run("full"), [], "trained"
    if wrong == "no run":
        run, said = tiny, "finished run"
    elif wrong != "trained":
        run = tmp_path / "run"
        settings = ("-s", "freeze", "--set", "strategy.features=all", "--workers", 0)
        assert cli("run", "-b", tiny, "-d", image_folder, *settings, "-o", run).exit_code == 0
        given = {
            "other image": ([next((image_folder / "train/red").iterdir())], "did not evaluate"),
            "data": (["--data", image_folder], "those of the run"),
            "no mistake": ([], "misclassified"),
        }
        words, said = given[wrong]
    result = cli("explain", "influence", run, *words, "-o", tmp_path / "out")
    assert result.exit_code == 2 and said in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()
