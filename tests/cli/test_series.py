"""``finetune run --repeats`` and ``--folds``: several runs, their mean and standard deviation."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from finetune.cli.training.series import drop_seed
from tests.conftest import Cli, draw_folder

QUICK = ("--workers", 0, "--batch-size", 8, "--set", "input.augmentation=none")


@pytest.mark.slow
def test_seeds_give_a_mean_and_a_standard_deviation(
    cli: Cli, image_folder: Path, tiny: Path, tmp_path: Path
) -> None:
    words = ("run", "-b", tiny, "-d", image_folder, "-s", "freeze", "--epochs", 1, "--repeats", 3, *QUICK)
    result = cli(*words, "--seed", 4, "-o", tmp_path / "s", "--json")
    assert result.exit_code == 0, result.output
    series = json.loads(result.stdout)
    assert series == json.loads((tmp_path / "s" / "series.json").read_text())
    own = [json.loads((tmp_path / "s" / f"seed-{seed}" / "metrics.json").read_text()) for seed in (4, 5, 6)]
    for name in ("accuracy", "loss", "roc_auc"):
        values = [metrics[name] for metrics in own]
        assert series["mean"][name] == pytest.approx(statistics.fmean(values))
        assert series["std"][name] == pytest.approx(statistics.stdev(values))
    assert len({metrics["loss"] for metrics in own}) == 3
    assert series["split_chose_checkpoint"] is True
    assert pd.read_csv(tmp_path / "s" / "series.csv")["run"].tolist() == ["seed-4", "seed-5", "seed-6"]
    again = cli(*words, "--seed", 4, "-o", tmp_path / "s", "--json")
    assert json.loads(again.stdout) == series
    assert again.stderr.count("already holds this run") == 3


@pytest.mark.slow
def test_every_image_is_validated_in_one_fold(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "data", {"blue": 9, "red": 7})
    result = cli("run", "-b", tiny, "-d", data, "-s", "freeze", "--epochs", 1, "--folds", 3, *QUICK,
                 "-o", tmp_path / "f", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["kind"] == "folds"
    evaluated: list[str] = []
    for fold in (1, 2, 3):
        predictions = pd.read_csv(tmp_path / "f" / f"fold-{fold}" / "predictions.csv")
        split = pd.read_csv(tmp_path / "f" / f"fold-{fold}" / "split.csv")
        assert not set(predictions["path"]) & set(split[split["split"] == "train"]["path"])
        evaluated += predictions["path"].tolist()
    assert len(evaluated) == len(set(evaluated)) == 16


def test_a_run_that_fails_ends_the_series(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "data", {"blue": 1, "red": 7})
    result = cli("run", "-b", tiny, "-d", data, "--repeats", 2, *QUICK, "-o", tmp_path / "s")
    assert result.exit_code == 65
    assert not (tmp_path / "s" / "series.json").exists()


@pytest.mark.parametrize("names", [["series.csv"], ["series.csv", "thesis.txt"], ["seed-0", "notes"]])
def test_files_of_others_are_kept(
    cli: Cli, image_folder: Path, tiny: Path, tmp_path: Path, names: list[str]
) -> None:
    (tmp_path / "s").mkdir()
    for name in names:
        (tmp_path / "s" / name).write_text("theirs")
    result = cli("run", "-b", tiny, "-d", image_folder, "--repeats", 2, *QUICK, "-o", tmp_path / "s")
    assert result.exit_code == 2 and "the folder holds other files" in result.stderr
    assert {path.name: path.read_text() for path in (tmp_path / "s").iterdir()} == dict.fromkeys(
        names, "theirs"
    )


def test_invalid_series_are_refused(cli: Cli, image_folder: Path, tiny: Path, tmp_path: Path) -> None:
    words = ("run", "-b", tiny, "-d", image_folder, "-s", "freeze", "--epochs", 1, *QUICK)
    assert cli(*words, "--repeats", 2, "--folds", 2, "-o", tmp_path / "s").exit_code == 2
    assert cli(*words, "-o", tmp_path / "one").exit_code == 0
    result = cli(*words, "--repeats", 2, "-o", tmp_path / "one")
    assert result.exit_code == 2
    assert "it holds a single run" in result.stderr


@pytest.mark.slow
def test_every_run_of_a_series_has_a_supervisor(image_folder: Path, tiny: Path, tmp_path: Path) -> None:
    words = ["run", "-b", tiny, "-d", image_folder, "-s", "freeze", "--epochs", "1", "--repeats", "2", *QUICK]
    words += ["--stall-timeout", "300", "-o", tmp_path / "s", "--json"]
    command = [sys.executable, "-m", "finetune", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_runs"] == 2
    outcome = json.loads((tmp_path / "s" / "seed-1" / "outcome.json").read_text())
    assert outcome["state"] == "done"


@pytest.mark.slow
@pytest.mark.parametrize("words", [("--set", "seed=7"), ("--seed", 7), ("--recipe", "seven.yaml")])
def test_seeds_begin_with_the_given_one(
    cli: Cli,
    image_folder: Path,
    tiny: Path,
    tmp_path: Path,
    words: tuple[object, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("seven.yaml").write_text("seed: 7\n")
    result = cli("run", "-b", tiny, "-d", image_folder, "-s", "freeze", "--epochs", 1, *QUICK, *words,
                 "--repeats", 2, "-o", "s")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in Path("s").iterdir() if path.is_dir()) == ["seed-7", "seed-8"]
    assert "seed: 8" in Path("s/seed-8/recipe.yaml").read_text()


def test_the_seed_is_dropped_from_a_command_line() -> None:
    words = ["run", "--seed", "3", "--set", "seed=4", "--set=seed=5", "--seed=6", "--set", "training.lr=1"]
    assert drop_seed([*words, "-d", "seed=x"]) == ["run", "--set", "training.lr=1", "-d", "seed=x"]
    assert drop_seed(["run", "--set", "data.path=seed"]) == ["run", "--set", "data.path=seed"]


@pytest.mark.slow
def test_a_failed_series_removes_an_old_result(
    cli: Cli, image_folder: Path, tiny: Path, tmp_path: Path
) -> None:
    words = (
        "run",
        "-b",
        tiny,
        "-d",
        image_folder,
        "-s",
        "freeze",
        "--repeats",
        2,
        *QUICK,
        "-o",
        tmp_path / "s",
    )
    assert cli(*words, "--epochs", 1).exit_code == 0
    (tmp_path / "s" / "seed-1" / "recipe.yaml").write_text("nonsense: 1\n")
    assert cli(*words, "--epochs", 2).exit_code != 0
    assert not (tmp_path / "s" / "series.json").exists()
