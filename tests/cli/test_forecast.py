"""``finetune forecast`` from the command line, and its Python function."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

import finetune
from finetune.features.forecast import learning_curve
from finetune.system.display import SilentDisplay
from tests.conftest import Cli, FinishedRun, draw_folder

WORDS = ("--device", "cpu", "--workers", 0)


@pytest.fixture(autouse=True)
def few_subsets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning_curve, "NUM_SUBSETS", 2)


def test_a_forecast_of_a_folder(cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path) -> None:
    words = ("-b", tiny, "-d", image_folder, "-o", tmp_path / "out", *WORDS)
    result = cli("forecast", *words, "--target-accuracy", 0.5)
    assert result.exit_code == 0, result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "forecast.json",
        "forecast.csv",
        "forecast.svg",
        "forecast.png",
    }
    found = json.loads((tmp_path / "out/forecast.json").read_text())
    assert (found["num_images"], found["num_classes"], found["level"]) == (54, 3, 0.9)
    assert [point["images"] for point in found["forecast"]] == [54, 108, 216]
    assert [point["times"] for point in found["forecast"]] == [1, 2, 4]
    assert found["measured"][-1]["images"] == 54 and len(found["measured"]) == 7
    for point in found["measured"] + found["forecast"]:
        assert 0 <= point["low"] <= point["accuracy"] <= point["high"] <= 1
    assert found["measured"][-1]["accuracy"] > 0.8  # colours are easy
    assert found["requirement"]["answer"] == "reached"
    table = pd.read_csv(tmp_path / "out/forecast.csv")
    assert list(table["kind"]) == ["measured"] * 7 + ["forecast"] * 3
    assert table["accuracy"].iloc[-1] == pytest.approx(found["forecast"][-1]["accuracy"])
    assert Image.open(tmp_path / "out/forecast.png").size[0] > 700
    assert "forecast, 4x" in result.stdout and "216" in result.stdout
    assert "50 % accuracy: reached with the images at hand" in result.stdout


@pytest.mark.slow
def test_a_forecast_is_the_same_twice_and_json(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    words = ("-b", tiny, "-d", image_folder, "--json", *WORDS)
    one, two = (json.loads(cli("forecast", *words, "-o", tmp_path / name).stdout) for name in "ab")
    assert one == two and one["requirement"] is None
    assert one == json.loads((tmp_path / "a/forecast.json").read_text())
    other = json.loads(cli("forecast", *words, "-o", tmp_path / "c", "--seed", 1).stdout)
    assert other["forecast"] != one["forecast"]


@pytest.mark.slow
def test_a_run_gives_images_network_and_features(
    cli: Cli, finished_run: FinishedRun, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    run = finished_run("freeze")
    of_run = cli("forecast", run, "-o", tmp_path / "run", "--json", *WORDS)
    assert of_run.exit_code == 0, of_run.stderr
    words = ("-b", tiny, "-d", image_folder, "-o", tmp_path / "data", "--json", *WORDS)
    assert json.loads(of_run.stdout) == json.loads(cli("forecast", *words).stdout)
    everything = ("--set", "strategy.features=all")
    of_all = json.loads(cli("forecast", run, "-o", tmp_path / "all", "--json", *everything, *WORDS).stdout)
    assert len(of_all["layers"]) > 1


@pytest.mark.slow
def test_the_function_is_the_command(tiny: Path, image_folder: Path, tmp_path: Path) -> None:
    found = finetune.forecast(
        data=image_folder,
        backbone=str(tiny),
        workers=0,
        device="cpu",
        target_accuracy=0.5,
        output=tmp_path / "out",
        display=SilentDisplay(),
    )
    assert found.to_dict() == json.loads((tmp_path / "out/forecast.json").read_text())
    assert found.requirement is not None and found.requirement.answer == "reached"


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("few", [7, 2])
def test_a_class_of_fewer_than_eight_images_is_refused(
    cli: Cli, tiny: Path, tmp_path: Path, few: int
) -> None:
    draw_folder(tmp_path / "data", {"blue": 12, "green": few, "red": 8})
    result = cli("forecast", "-b", tiny, "-d", tmp_path / "data", "-o", tmp_path / "out", *WORDS)
    assert result.exit_code == 65
    said = f"at least 8 images of every class, and class 'green' has {few}"
    assert said in " ".join(result.stderr.split()), result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_exact_copies_do_not_make_a_class_large(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "data", {"blue": 12, "red": 7})
    for number in range(5):
        shutil.copyfile(folder / "red/000.jpg", folder / f"red/copy{number}.jpg")
    result = cli("forecast", "-b", tiny, "-d", folder, "-o", tmp_path / "out", *WORDS)
    assert result.exit_code == 65 and "class 'red' has 7" in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_a_class_of_two_named_groups_is_refused(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "data", {"blue": 12, "red": 12})
    rows = [
        (f"{name}/{number:03}.jpg", name, f"{name}{number % (2 if name == 'red' else 6)}")
        for name in ("blue", "red")
        for number in range(12)
    ]
    pd.DataFrame(rows, columns=["path", "label", "who"]).to_csv(folder / "table.csv", index=False)
    words = ("--set", "data.group_by=who", *WORDS)
    result = cli("forecast", "-b", tiny, "-d", folder / "table.csv", "-o", tmp_path / "out", *words)
    assert result.exit_code == 65, result.stderr
    assert "class 'red' are only 2 groups" in " ".join(result.stderr.split())


def test_images_without_labels_are_refused(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    draw_folder(tmp_path / "data", {"one": 9})
    result = cli("forecast", "-b", tiny, "-d", tmp_path / "data", "-o", tmp_path / "out", *WORDS)
    assert result.exit_code == 65 and "no image has a label" in result.stderr


def test_a_target_in_percent_is_refused_before_images_are_read(cli: Cli, tmp_path: Path) -> None:
    result = cli("forecast", "-d", tmp_path / "none", "--target-accuracy", 95, *WORDS)
    assert result.exit_code == 2 and "0.95" in result.stderr


def test_a_run_with_other_images_or_a_folder_that_is_none_is_refused(
    cli: Cli, finished_run: FinishedRun, image_folder: Path, tmp_path: Path
) -> None:
    both = cli("forecast", finished_run("freeze"), "-d", image_folder, "-o", tmp_path / "out", *WORDS)
    assert both.exit_code == 2 and "Leave out --data, or the run" in both.stderr
    network = cli("forecast", finished_run("freeze"), "-b", "resnet18", "-o", tmp_path / "out", *WORDS)
    assert network.exit_code == 2 and "Leave out --backbone, or the run" in network.stderr
    none = cli("forecast", tmp_path, "-o", tmp_path / "out", *WORDS)
    assert none.exit_code == 2 and "not a run folder" in none.stderr
    nothing = cli("forecast", "-o", tmp_path / "out", *WORDS)
    assert nothing.exit_code == 2 and "no data was named" in nothing.stderr


def test_too_wide_a_forecast_says_so(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.features.forecast.forecast.MOST_WIDTH", 0.0)
    result = cli("forecast", "-b", tiny, "-d", image_folder, "-o", tmp_path / "out", *WORDS)
    assert result.exit_code == 0 and result.stdout.count("cannot say") == 3
    found = json.loads((tmp_path / "out/forecast.json").read_text())
    assert [point["can_say"] for point in found["forecast"]] == [False] * 3
