"""``finetune run`` from the command line, on images that a tiny network can classify."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file

from tests.conftest import QUICK_RUN, Cli, FinishedRun, draw_folder

QUICK = ("--workers", 0, "--batch-size", 8, "--set", "input.augmentation=none")


@pytest.mark.parametrize("strategy", ["freeze", "top", "full", "scratch"])
def test_every_strategy_ends_in_a_complete_folder(finished_run: FinishedRun, strategy: str) -> None:
    output = finished_run(strategy)
    metrics = json.loads((output.parent / "said.json").read_text())
    assert metrics["run"] == str(output)
    assert metrics["strategy"] == strategy
    assert {key: value for key, value in metrics.items() if key != "run"} == json.loads(
        (output / "metrics.json").read_text()
    )
    drawn = {path for path in (output / "plots").iterdir() if path.suffix in (".svg", ".jpg")}
    files = {path for path in output.rglob("*") if path.is_file()}
    names = {path.relative_to(output).as_posix() for path in files - drawn}
    names = {re.sub(r"checkpoint-\d{6}/", "checkpoint-N/", name) for name in names}
    assert (output / "plots" / "confusion_matrix.svg") in drawn
    assert names == {
        "recipe.yaml",
        "environment.json",
        "classes.txt",
        "split.csv",
        "check.json",
        "plan.csv",
        *(["trunk.json"] if strategy in ("freeze", "top") else []),
        "history.csv",
        "metrics.json",
        "predictions.csv",
        "confusion_matrix.csv",
        "per_class.csv",
        "report.html",
        "checkpoints/checkpoint-N/state.safetensors",
        "checkpoints/checkpoint-N/best.safetensors",
        "checkpoints/checkpoint-N/manifest.json",
        "model/config.json",
        "model/model.safetensors",
        "model/README.md",
        "run.log",
        "outcome.json",
        "progress.json",
    }
    assert json.loads((output / "outcome.json").read_text())["state"] == "done"


def test_colours_are_learned_and_the_files_agree(finished_run: FinishedRun) -> None:
    output = finished_run("freeze")
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["accuracy"] >= 0.9
    assert metrics["split"] == "val"
    assert metrics["split_chose_checkpoint"] is True
    assert metrics["num_samples"] == 18
    assert "top5_accuracy" not in metrics  # three classes

    predictions = pd.read_csv(output / "predictions.csv")
    assert (predictions.label == predictions.predicted).mean() == pytest.approx(metrics["accuracy"])
    probabilities = predictions[["prob_blue", "prob_green", "prob_red"]]
    assert probabilities.sum(axis=1).to_numpy() == pytest.approx(1)
    assert predictions.confidence.to_numpy() == pytest.approx(probabilities.max(axis=1).to_numpy())
    confusion = pd.read_csv(output / "confusion_matrix.csv", index_col="label")
    assert confusion.to_numpy().sum() == 18
    assert confusion.to_numpy().trace() / 18 == pytest.approx(metrics["accuracy"])
    history = pd.read_csv(output / "history.csv")
    assert list(history.columns[:5]) == ["epoch", "lr", "train_loss", "eval_loss", "eval_accuracy"]
    assert list(history.epoch) == [1, 2, 3, 4, 5]
    assert history.eval_accuracy[metrics["best_epoch"] - 1] == pytest.approx(metrics["val_accuracy"])
    assert (output / "classes.txt").read_text().split() == ["blue", "green", "red"]


@pytest.mark.slow
def test_metrics_come_from_the_test_split_if_there_is_one(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    for part, count in (("train", 6), ("val", 3), ("test", 2)):
        draw_folder(tmp_path / "data" / part, {"blue": count, "red": count})
    result = cli(
        "run", "-b", tiny, "-d", tmp_path / "data", "--epochs", 1, "-o", tmp_path / "run", "--json", *QUICK
    )
    metrics = json.loads(result.stdout)
    assert (metrics["split"], metrics["split_chose_checkpoint"], metrics["num_samples"]) == ("test", False, 4)
    assert set(pd.read_csv(tmp_path / "run" / "predictions.csv").path) == {
        f"test/{name}/{number:03}.jpg" for name in ("blue", "red") for number in range(2)
    }


@pytest.mark.slow
def test_six_classes_have_a_top5_accuracy(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    draw_folder(tmp_path / "data", {f"class{number}": 4 for number in range(6)})
    result = cli(
        "run", "-b", tiny, "-d", tmp_path / "data", "--epochs", 1, "-o", tmp_path / "run", "--json", *QUICK
    )
    metrics = json.loads(result.stdout)
    assert metrics["accuracy"] <= metrics["top5_accuracy"] <= 1
    split = pd.read_csv(tmp_path / "run" / "split.csv")
    assert split.groupby("label").split.value_counts().unstack().val.tolist() == [1] * 6


@pytest.mark.slow
def test_the_saved_recipe_repeats_the_run(cli: Cli, image_folder: Path, tiny: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    words = (
        "--set",
        "training.mixup=0.2",
        "--set",
        "strategy.dropout=0.3",
        "--set",
        "input.augmentation=medium",
    )
    assert (
        cli(
            "run", "-b", tiny, "-d", image_folder, "--epochs", 2, "-o", first, "--workers", 0, *words
        ).exit_code
        == 0
    )
    assert cli("run", "--recipe", first / "recipe.yaml", "-o", second).exit_code == 0
    assert (first / "recipe.yaml").read_text() == (second / "recipe.yaml").read_text()
    assert (first / "predictions.csv").read_bytes() == (second / "predictions.csv").read_bytes()
    one, two = (load_file(run / "model" / "model.safetensors") for run in (first, second))
    assert all(one[name].equal(two[name]) for name in one)


@pytest.mark.slow
def test_workers_do_not_change_a_bit(cli: Cli, image_folder: Path, tiny: Path, tmp_path: Path) -> None:
    runs = []
    for workers in (0, 2):
        runs.append(tmp_path / str(workers))
        result = cli(
            *(
                "run",
                "-b",
                tiny,
                "-d",
                image_folder,
                "-s",
                "full",
                "--epochs",
                2,
                "-o",
                runs[-1],
                "--workers",
                workers,
            ),
            *("--batch-size", 8, "--set", "input.augmentation=heavy", "--set", "strategy.dropout=0.3"),
        )
        assert result.exit_code == 0, result.output
    one, two = (load_file(run / "model" / "model.safetensors") for run in runs)
    assert all(one[name].equal(two[name]) for name in one)


def test_a_finished_run_is_not_repeated(
    cli: Cli, finished_run: FinishedRun, image_folder: Path, tiny: Path, tmp_path: Path
) -> None:
    first = finished_run("freeze")
    copy = shutil.copytree(first, tmp_path / "run")
    before = (copy / "model" / "model.safetensors").stat().st_mtime_ns
    again = cli("run", "-b", tiny, "-d", image_folder, "-s", "freeze", "-o", copy, "--json", *QUICK_RUN)
    assert again.exit_code == 0, again.output
    said = json.loads((first.parent / "said.json").read_text())
    assert json.loads(again.stdout) == said | {"run": str(copy)}
    assert (copy / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_a_run_is_the_backbone_of_the_next(cli: Cli, finished_run: FinishedRun, tmp_path: Path) -> None:
    first = finished_run("full")
    draw_folder(tmp_path / "data", {"light": 6, "dark": 6})
    result = cli("run", "-b", first, "-d", tmp_path / "data", "--epochs", 1, "-o", tmp_path / "b", *QUICK)
    assert result.exit_code == 0, result.output
    assert "0 missing" in result.stderr


def test_head_keep_continues_with_the_same_labels(
    cli: Cli, finished_run: FinishedRun, image_folder: Path, tmp_path: Path
) -> None:
    first = finished_run("freeze")
    keep = ("--set", "strategy.head=keep", "--lr", 1e-9, "-s", "freeze")
    result = cli("run", "-b", first, "-d", image_folder, "--epochs", 1, "-o", tmp_path / "b", *keep, *QUICK)
    assert result.exit_code == 0, result.output
    one, two = (pd.read_csv(run / "predictions.csv") for run in (first, tmp_path / "b"))
    assert two.confidence.to_numpy() == pytest.approx(one.confidence.to_numpy(), abs=1e-4)


@pytest.mark.slow
def test_nothing_is_written_into_the_data_folder(
    cli: Cli, image_folder: Path, tiny: Path, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in image_folder.rglob("*")}
    assert (
        cli("run", "-b", tiny, "-d", image_folder, "--epochs", 1, "-o", tmp_path / "run", *QUICK).exit_code
        == 0
    )
    assert {path: path.stat().st_mtime_ns for path in image_folder.rglob("*")} == before


@pytest.mark.slow
def test_fine_tuning_a_good_model_with_defaults_keeps_its_accuracy(
    cli: Cli, finished_run: FinishedRun, image_folder: Path, tmp_path: Path
) -> None:
    first = finished_run("freeze")
    words = ("--set", "strategy.head=keep", "-s", "freeze", "--epochs", 1, *QUICK)
    assert cli("run", "-b", first, "-d", image_folder, "-o", tmp_path / "b", *words).exit_code == 0
    one, two = (json.loads((run / "metrics.json").read_text()) for run in (first, tmp_path / "b"))
    assert two["accuracy"] >= one["accuracy"] - 0.06


@pytest.mark.slow
def test_the_data_are_named_as_they_were_given(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "data", {"red": 5, "blue": 5})
    rows = [f"data/{path.parent.name}/{path.name},{path.parent.name}" for path in data.rglob("*.jpg")]
    (tmp_path / "table.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    result = cli(
        "run", "-b", tiny, "-d", tmp_path / "table.csv", "--epochs", 1, "-o", tmp_path / "run", *QUICK
    )
    said = f"data {tmp_path / 'table.csv'}: 2 classes, 8 train, 2 val; 4 training images a class"
    assert said in result.stderr.splitlines()


@pytest.mark.slow
def test_a_backbone_trained_on_the_evaluated_images_is_refused(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    """Another seed draws another validation split: images that the first run was trained on."""
    data = draw_folder(tmp_path / "data", {"blue": 10, "red": 10})
    words = ("run", "-d", data, "-s", "freeze", "--epochs", 1, *QUICK)
    assert cli(*words, "-b", tiny, "-o", tmp_path / "one").exit_code == 0
    second = (*words, "-b", tmp_path / "one", "--seed", 1, "-o", tmp_path / "two", "--json")
    result = cli(*second)
    assert result.exit_code == 65
    assert "the backbone was trained on" in result.stderr
    result = cli(*second, "--allow-leaks")
    assert result.exit_code == 0, result.output
    metrics = json.loads(result.stdout)
    assert metrics["num_seen_by_backbone"] > 0
    assert metrics["num_leaked"] == 0
    assert "allow_leaks: true" in (tmp_path / "two" / "recipe.yaml").read_text()
    same = cli(*words, "-b", tmp_path / "one", "-o", tmp_path / "three", "--json")
    assert json.loads(same.stdout)["num_seen_by_backbone"] == 0


@pytest.mark.slow
def test_allowed_leaks_are_counted(cli: Cli, image_folder: Path, tiny: Path, tmp_path: Path) -> None:
    data = shutil.copytree(image_folder, tmp_path / "data")
    shutil.copy(data / "train" / "red" / "000.jpg", data / "val" / "red" / "copy.jpg")
    words = ("run", "-b", tiny, "-d", data, "-s", "freeze", "--epochs", 1, *QUICK, "-o", tmp_path / "run")
    assert cli(*words).exit_code == 65
    result = cli(*words, "--allow-leaks", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["num_leaked"] == 1
    assert "allow_leaks: true" in (tmp_path / "run" / "recipe.yaml").read_text()
