"""The data check of a run, and ``finetune check``: refusals, the drawn split, and the written files."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.errors import ExitCode
from tests.conftest import COLOURS, Cli, draw_folder
from tests.data.quality.spoilt import spoil

QUICK = ("-s", "freeze", "--epochs", 1, "--workers", 0, "--batch-size", 8, "--set", "input.augmentation=none")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def leaky(image_folder: Path, tmp_path: Path) -> Path:
    root = shutil.copytree(image_folder, tmp_path / "data")
    shutil.copy(root / "train/red/000.jpg", root / "val/red/copy.jpg")
    return root


@pytest.mark.slow
def test_a_run_refuses_copies_in_two_splits(cli: Cli, tiny: Path, leaky: Path, tmp_path: Path) -> None:
    words = ["run", "-b", tiny, "-d", leaky, "-o", tmp_path / "run", *QUICK]
    result = cli(*words)
    assert result.exit_code == ExitCode.DATA == 65
    assert "1 of 19 val images is an exact copy" in result.stderr
    assert "val/red/copy.jpg" in result.stderr and "--allow-leaks" in result.stderr
    assert read(tmp_path / "run" / "check.json")["errors"] == 1
    allowed = cli(*words, "--allow-leaks")
    assert allowed.exit_code == 0, allowed.output
    assert "warning: 1 of 19 val images is an exact copy" in allowed.stderr
    assert read(tmp_path / "run" / "check.json")["errors"] == 0


@pytest.mark.slow
def test_a_run_keeps_its_own_draw_free_of_copies(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "data", dict.fromkeys(COLOURS, 12))
    for name in COLOURS:
        for number in range(8):
            shutil.copy(data / name / f"{number:03}.jpg", data / name / f"copy{number}.jpg")
    words = ["run", "-b", tiny, "-d", data, "-o", tmp_path / "run", *QUICK]
    result = cli(*words)
    assert result.exit_code == 0, result.output
    assert "exact copies stay in one split" in result.stderr
    split = rows(tmp_path / "run" / "split.csv")
    splits: dict[str, set[str]] = {}
    for row in split:
        splits.setdefault(row["sha256"], set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values())
    assert {row["label"] for row in split if row["split"] == "val"} == set(COLOURS)
    again = cli(*words)
    assert again.exit_code == 0 and "already holds this run" in again.stderr
    longer = cli(*[2 if word == 1 else word for word in words])
    assert longer.exit_code == 0, longer.output
    assert rows(tmp_path / "run" / "split.csv") == split


@pytest.mark.slow
def test_a_run_on_a_fold(cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path) -> None:
    held: list[str] = []
    for fold in (1, 2):
        output = tmp_path / f"fold{fold}"
        settings = ("--set", "data.folds=2", "--set", f"data.fold={fold}")
        result = cli("run", "-b", tiny, "-d", image_folder, "-o", output, *settings, *QUICK)
        assert result.exit_code == 0, result.output
        held += [row["path"] for row in rows(output / "split.csv") if row["split"] == "val"]
    assert len(held) == len(set(held)) == 54
    assert cli("check", image_folder, "--folds", 2, "-o", tmp_path / "check").exit_code == 0
    folds = {row["path"]: int(row["fold"]) for row in rows(tmp_path / "check" / "folds.csv")}
    assert all(folds[path] == 1 + (place >= len(held) // 2) for place, path in enumerate(held))


@pytest.mark.slow
def test_check_finds_everything_and_ends_with_65(cli: Cli, tmp_path: Path) -> None:
    data = spoil(tmp_path / "data")
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    result = cli("check", data, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 65, result.output
    found = json.loads(result.stdout)
    assert found == read(tmp_path / "out" / "check.json")
    assert found["errors"] == 7 and len(found["findings"]) == 26
    assert set(found["findings"][0]) == {"code", "severity", "count", "message", "fix", "paths"}
    assert (tmp_path / "out" / "check.png").stat().st_size > 1000
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before
    words = cli("check", data, "-o", tmp_path / "words")
    assert "error: 1 file truncated: train/ants/cut.jpg" in words.stdout
    assert "7 errors, 18 warnings, 1 note;" in words.stdout


def test_check_of_good_data_ends_with_0(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    result = cli("check", image_folder, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "0 errors" in result.stdout and "54 images (36 train, 18 val), 3 classes" in result.stdout
    assert not (tmp_path / "out" / "check.png").exists()


@pytest.mark.parametrize("data", ["nothing", "empty", "text.csv"])
def test_data_that_cannot_be_read_is_one_issue(cli: Cli, tmp_path: Path, data: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.csv").write_text("hello\n")
    result = cli("check", tmp_path / data, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 65
    found = json.loads(result.stdout)
    assert found["errors"] == 1 and found["summary"] == {}


def test_check_writes_nothing_among_the_images(cli: Cli, image_folder: Path) -> None:
    result = cli("check", image_folder, "-o", image_folder / "out")
    assert result.exit_code == ExitCode.USAGE and not (image_folder / "out").exists()


def test_check_needs_data_or_a_run(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    assert cli("check", "-o", tmp_path / "a").exit_code == ExitCode.USAGE
    assert cli("check", image_folder, "--run", tmp_path, "-o", tmp_path / "a").exit_code == ExitCode.USAGE
    result = cli("check", "--run", tmp_path, "-o", tmp_path / "a")
    assert result.exit_code == ExitCode.USAGE and "it is not a run folder" in result.stderr


def test_groups_on_the_command_line(cli: Cli, tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "data", {"red": 20, "blue": 20})
    result = cli("check", data, "--group-by", "^(red|blue)", "-o", tmp_path / "a", "--json")
    assert json.loads(result.stdout)["findings"][0]["code"] == "group-single"
    result = cli("check", data, "--group-by", r"(\d)\.jpg", "-o", tmp_path / "b", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["summary"]["num_groups"] == 10


@pytest.mark.slow
def test_wrong_labels_of_a_run_are_suspected(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "data", dict.fromkeys(COLOURS, 20))
    for number in (3, 7):
        (data / "red" / f"{number:03}.jpg").rename(data / "blue" / f"wrong{number}.jpg")
    run = tmp_path / "run"
    assert cli("run", "-b", tiny, "-d", data, "-o", run, *QUICK).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    result = cli("check", "--run", run, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    found = json.loads(result.stdout)
    table = rows(tmp_path / "out" / "label_issues.csv")
    assert {row["path"] for row in table[:2]} == {"blue/wrong3.jpg", "blue/wrong7.jpg"}
    assert (table[0]["label"], table[0]["suggested"]) == ("blue", "red")
    assert found["num_judged"] == found["num_images"] == 60
    assert [row["path"] for row in found["label_issues"]] == [row["path"] for row in table]
    assert (tmp_path / "out" / "label_issues.png").stat().st_size > 1000


@pytest.mark.slow
def test_changed_images_are_left_out_and_a_run_as_backbone_is_reported(
    cli: Cli, tiny: Path, tmp_path: Path
) -> None:
    data = draw_folder(tmp_path / "data", dict.fromkeys(COLOURS, 12))
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli("run", "-b", tiny, "-d", data, "-o", first, *QUICK).exit_code == 0
    assert cli("run", "-b", first / "model", "-d", data, "-o", second, *QUICK).exit_code == 0
    shutil.copy(data / "red/001.jpg", data / "blue/000.jpg")
    result = cli("check", "--run", first, "-o", tmp_path / "a", "--json")
    assert result.exit_code == 0, result.output
    assert "1 image (blue/000.jpg) changed since the run" in result.stderr
    assert "backbone of this run" not in result.stderr
    assert json.loads(result.stdout)["num_images"] == 35
    result = cli("check", "--run", second, "-o", tmp_path / "b")
    assert "was trained on or chosen by 35 of these images" in result.stderr


@pytest.mark.parametrize("option", [("--folds", 3), ("--seed", 1), ("--set", "seed=1"), ("--allow-leaks",)])
def test_options_of_the_split_are_refused_with_a_run(
    cli: Cli, tmp_path: Path, option: tuple[object, ...]
) -> None:
    result = cli("check", "--run", tmp_path, *option, "-o", tmp_path / "a")
    assert result.exit_code == ExitCode.USAGE and str(option[0]) in result.stderr


def test_a_link_whose_name_is_not_utf8_is_reported(cli: Cli, tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "data", {"red": 4, "blue": 4})
    (data / "red" / os.fsdecode(b"\xff.jpg")).symlink_to("/etc/passwd")
    result = cli("check", data, "-o", tmp_path / "a", "--json")
    assert result.exit_code == 65, result.output
    assert {"link-outside"} <= {one["code"] for one in json.loads(result.stdout)["findings"]}


def test_folds_that_cannot_all_be_held_out_end_with_65(cli: Cli, tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "data", {"red": 12, "blue": 12})
    for number in range(1, 12):
        shutil.copy(data / "red/000.jpg", data / f"red/{number:03}.jpg")
    result = cli("check", data, "--folds", 3, "-o", tmp_path / "a", "--json")
    assert result.exit_code == 65
    assert "has every image of class 'red'" in json.loads(result.stdout)["findings"][0]["message"]


@pytest.mark.slow
def test_a_new_copy_joins_its_image_and_another_recipe_draws_anew(
    cli: Cli, tiny: Path, tmp_path: Path
) -> None:
    data = draw_folder(tmp_path / "data", dict.fromkeys(COLOURS, 12))
    run = tmp_path / "run"
    words = ["run", "-b", tiny, "-d", data, "-o", run, *QUICK]
    assert cli(*words).exit_code == 0
    before = {row["path"]: row["split"] for row in rows(run / "split.csv")}
    for path in before:
        shutil.copy(data / path, data / path.replace(".jpg", "_copy.jpg"))
    result = cli(*words, "--allow-changed")
    assert result.exit_code == 0, result.output
    after = {row["path"]: row["split"] for row in rows(run / "split.csv")}
    assert after == before | {path.replace(".jpg", "_copy.jpg"): split for path, split in before.items()}
    result = cli(*words, "--allow-changed", "--set", "data.val_fraction=0.5")
    assert result.exit_code == 0, result.output
    split = rows(run / "split.csv")
    assert sum(row["split"] == "val" for row in split) == 36
    by_digest: dict[str, set[str]] = {}
    for row in split:
        by_digest.setdefault(row["sha256"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in by_digest.values())


@pytest.mark.slow
def test_only_training_draws_a_split_and_keeps_copies_together(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "data", dict.fromkeys(COLOURS, 12))
    for name in COLOURS:
        for number in range(8):
            shutil.copy(data / name / f"{number:03}.jpg", data / name / f"copy{number}.jpg")
    assert cli("run", "-b", tiny, "-d", data, "-o", tmp_path / "run", *QUICK).exit_code == 0
    split = {row["path"]: row["split"] for row in rows(tmp_path / "run/split.csv")}
    assert set(split.values()) == {"train", "val"}
    for name in COLOURS:
        for number in range(8):
            assert split[f"{name}/{number:03}.jpg"] == split[f"{name}/copy{number}.jpg"]
    result = cli("extract", "-b", tiny, "-d", data, "--layers", "last", "-o", tmp_path / "rows.csv")
    assert result.exit_code == 0, result.output
    assert {row["split"] for row in rows(tmp_path / "rows.csv")} == {"train"}
    result = cli(
        "probe", "-b", tiny, "-d", data, "--layers", "last", "-o", tmp_path / "probe", "--per-class", 5
    )
    assert result.exit_code == 0, result.output
    assert "24 exact copies are left out" in result.stderr


# --- on the screen -------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--data", "-d"])
def test_data_are_named_as_for_the_other_commands(
    cli: Cli, image_folder: Path, tmp_path: Path, flag: str
) -> None:
    result = cli("check", flag, image_folder, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["summary"]["num_images"] == 54
    both = cli("check", image_folder, flag, image_folder, "-o", tmp_path / "both")
    assert both.exit_code == ExitCode.USAGE and "twice" in both.stderr
    of_run = cli("check", flag, image_folder, "--run", tmp_path, "-o", tmp_path / "both")
    assert of_run.exit_code == ExitCode.USAGE and "data and a run" in of_run.stderr


def resave(source: Path, target: Path) -> None:
    """Write a near copy: the same image with another compression."""
    Image.open(source).save(target, quality=60)


def test_copies_leaks_and_double_labels_are_named(cli: Cli, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = tmp_path / "data"
    for split, label, number in product(("train", "val"), ("x", "y"), range(12)):
        (data / split / label).mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
        coarse.resize((64, 64)).save(data / split / label / f"{number:02}.png")
    for number in range(8):
        shutil.copy(data / f"train/x/{number:02}.png", data / f"val/x/leak{number}.png")
    shutil.copy(data / "train/y/03.png", data / "train/x/double.png")
    resave(data / "train/y/05.png", data / "val/y/near.jpg")
    result = cli("check", data, "-o", tmp_path / "out")
    assert result.exit_code == ExitCode.DATA
    lines = result.stdout.splitlines()
    assert "    train/x/00.png" in lines and "    val/x/leak0.png" in lines
    file = tmp_path / "out" / "check.json"
    assert f"    and 10 more, in {file}" in lines  # 8 images of train and 8 of val, and 6 are shown
    assert "    train/y/05.png and val/y/near.jpg" in lines
    assert "    train/x/double.png" in lines and "    train/y/03.png" in lines
    paths = {issue["code"]: issue["paths"] for issue in read(file)["findings"]}
    assert len(paths["leak"]) == 16 and set(paths["label-conflict"]) == {
        "train/x/double.png",
        "train/y/03.png",
    }
    assert "1 error, " in lines[-1]


@pytest.mark.slow
def test_a_path_that_does_not_exist_leaves_no_folder_and_loads_nothing(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    script = "import sys; from finetune.cli.app import app; app(standalone_mode=False)"
    for words in (["photo"], ["--data", tmp_path / "photo"], ["photo/", "-o", "out"]):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", script, "check", *map(str, words)],
            capture_output=True,
            check=False,
            text=True,
        )
        assert "does not exist; did you mean 'photos'?" in done.stdout, done.stderr[-2000:]
        assert "1 error, 0 warnings, 0 notes\n" in done.stdout and "everything" not in done.stdout
        assert " torch\n" not in done.stderr
    result = cli("check", "photo")
    assert result.exit_code == ExitCode.DATA
    result = cli("check", "--run", "photo")
    assert result.exit_code == ExitCode.USAGE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]
