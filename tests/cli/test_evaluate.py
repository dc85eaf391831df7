"""``finetune evaluate``: the metrics of the run on the same images, ensembles, views and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from finetune.cli.app import app
from finetune.evaluation import evaluate
from finetune.evaluation.variants import Variant, compute_variants
from tests.conftest import COLOURS, Cli, draw, draw_folder
from tests.sweeps import slow_except

QUICK = ("--workers", "0", "--batch-size", "8", "--set", "input.augmentation=none")
KINDS = ("blue", "green", "red")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for part, number in (("train", 8), ("val", 5), ("test", 4)):
        draw_folder(root / part, dict.fromkeys(KINDS, number))
    return root


@pytest.fixture(scope="module")
def runs(data: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs, evaluated on the ``test`` split."""
    folder, made = tmp_path_factory.mktemp("runs"), []
    for seed in (0, 1):
        words = ["run", "-b", tiny, "-d", data, "-s", "freeze", "--epochs", 2, "--seed", seed]
        result = CliRunner().invoke(app, [str(word) for word in [*words, "-o", folder / f"{seed}", *QUICK]])
        assert result.exit_code == 0, result.output
        made.append(folder / f"{seed}")
    return made[0], made[1]


def read(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / f"{name}.csv", keep_default_na=False)


@pytest.mark.slow
def test_evaluating_a_run_gives_its_own_metrics(cli: Cli, runs: tuple[Path, Path], tmp_path: Path) -> None:
    result = cli("evaluate", runs[0], "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    ours = json.loads(result.stdout)
    before = json.loads((runs[0] / "metrics.json").read_text())
    assert ours["split"] == before["split"] == "test"
    assert ours["split_chose_checkpoint"] is False
    assert ours["trained_on"] == 0
    for name in ("accuracy", "balanced_accuracy", "f1_macro", "roc_auc", "loss"):
        assert ours[name] == pytest.approx(before[name], abs=1e-4), name
    assert ours["calibration"]["temperature"] == before["calibration"]["temperature"]
    for name in ("ece", "ece_calibrated", "loss_calibrated"):
        assert ours["calibration"][name] == pytest.approx(before["calibration"][name], abs=1e-4), name
    assert ours["reject"] == before["reject"]
    one, other = read(tmp_path / "out", "predictions"), read(runs[0], "predictions")
    assert one["path"].tolist() == other["path"].tolist()
    assert one["predicted"].tolist() == other["predicted"].tolist()
    for name in KINDS:
        assert one[f"prob_{name}"].tolist() == pytest.approx(other[f"prob_{name}"].tolist(), abs=1e-4)
    assert read(tmp_path / "out", "per_class").equals(read(runs[0], "per_class"))


@pytest.mark.sample(1)
@pytest.mark.parametrize("change", ["another image", "removed"])
def test_data_that_change_meanwhile_are_refused_and_the_command_can_be_repeated(
    cli: Cli,
    runs: tuple[Path, Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
) -> None:
    shutil.copytree(data, tmp_path / "data")
    image, out = tmp_path / "data/test/red/000.jpg", tmp_path / "out"
    whole = image.read_bytes()

    def compute_and_change(*words: Any) -> list[Variant]:
        variants = list(compute_variants(*words))
        image.unlink() if change == "removed" else draw(image, COLOURS["blue"], seed=7)
        return variants

    monkeypatch.setattr(evaluate, "compute_variants", compute_and_change)
    result = cli("evaluate", runs[0], "-d", tmp_path / "data", "-o", out)
    assert result.exit_code == 65 and "1 image was changed or removed meanwhile" in result.stderr
    assert not out.exists()
    monkeypatch.undo()
    image.write_bytes(whole)
    assert cli("evaluate", runs[0], "-d", tmp_path / "data", "-o", out).exit_code == 0
    assert not (out / ".unfinished").exists()


def test_validation_images_are_reported_as_having_chosen_the_epoch(
    cli: Cli, runs: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    result = cli("evaluate", runs[0], "-d", data, "--split", "val", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert "also chose the epoch" in result.stderr
    assert json.loads(result.stdout)["split_chose_checkpoint"] is True
    assert json.loads(result.stdout)["num_samples"] == 15


def test_training_images_are_recognised_under_another_name(
    cli: Cli, runs: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    shutil.copytree(data / "test", tmp_path / "new")
    shutil.copy(data / "train" / "red" / "003.jpg", tmp_path / "new" / "red" / "other.jpg")
    result = cli("evaluate", runs[0], "-d", tmp_path / "new", "-o", tmp_path / "out")
    assert result.exit_code == 65
    assert "it was trained on 1 of 13 images (for example red/other.jpg" in result.stderr
    assert not (tmp_path / "out").exists()
    result = cli(
        "evaluate", runs[0], "-d", tmp_path / "new", "-o", tmp_path / "out", "--allow-leaks", "--json"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["trained_on"] == 1


def test_the_training_split_may_be_named(cli: Cli, runs: tuple[Path, Path], tmp_path: Path) -> None:
    result = cli("evaluate", runs[0], "--split", "train", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["trained_on"] == 24
    assert "say nothing about new images" in result.stderr


def test_a_class_without_images_is_not_zero(
    cli: Cli, runs: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    for name in ("blue", "green"):
        shutil.copytree(data / "test" / name, tmp_path / "new" / name)
    result = cli("evaluate", runs[0], "-d", tmp_path / "new", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["classes_not_judged"] == ["red"]
    row = read(tmp_path / "out", "per_class").set_index("label").loc["red"]
    assert (row["precision"], row["recall"], row["f1"], row["support"]) == ("n/a", "n/a", "n/a", 0)


def test_a_class_that_the_model_does_not_know_is_refused(
    cli: Cli, runs: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    shutil.copytree(data / "test", tmp_path / "new")
    (tmp_path / "new" / "red").rename(tmp_path / "new" / "reds")
    result = cli("evaluate", runs[0], "-d", tmp_path / "new", "-o", tmp_path / "out")
    assert result.exit_code == 65
    assert "1 class that the model does not know: 'reds'; did you mean 'red'?" in result.stderr


@pytest.mark.parametrize(
    "names", [("0", "1", "2"), ("ants", "bees", "flies"), ("ants", "bees", "blues"), ("one",)]
)
def test_data_of_other_classes_are_no_renaming(
    cli: Cli, runs: tuple[Path, Path], data: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    for name in names:
        shutil.copytree(data / "test" / "red", tmp_path / "new" / name)
    result = cli("evaluate", runs[0], "-d", tmp_path / "new", "-o", tmp_path / "out")
    assert result.exit_code == 65
    assert "holds other data: the model knows none of its" in result.stderr
    assert "only 'blue', 'green', 'red'" in result.stderr and "did you mean" not in result.stderr


def test_classes_that_are_all_spelt_in_another_way_are_a_renaming(
    cli: Cli, runs: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    for name in ("Blue", "Green", "Red"):
        shutil.copytree(data / "test" / name.lower(), tmp_path / "new" / name)
    result = cli("evaluate", runs[0], "-d", tmp_path / "new", "-o", tmp_path / "out")
    assert result.exit_code == 65
    assert "3 classes that the model does not know" in result.stderr and "did you mean" in result.stderr


def test_an_image_that_cannot_be_read_is_refused(
    cli: Cli, runs: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    shutil.copytree(data / "test", tmp_path / "new")
    (tmp_path / "new" / "red" / "000.jpg").write_bytes(b"no image")
    result = cli("evaluate", runs[0], "-d", tmp_path / "new", "-o", tmp_path / "out")
    assert result.exit_code == 65
    assert "red/000.jpg" in result.stderr
    assert not (tmp_path / "out").exists()


def test_several_models_are_the_mean_of_their_probabilities(
    cli: Cli, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    result = cli("evaluate", *runs, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    members = [read(run, "predictions") for run in runs]
    together = read(tmp_path / "out", "predictions")
    for name in KINDS:
        mean = sum(member[f"prob_{name}"] for member in members) / 2
        assert together[f"prob_{name}"].tolist() == pytest.approx(mean.tolist(), abs=1e-4)
    variants = read(tmp_path / "out", "variants")
    assert variants["views"].tolist() == [1, 1, 2]
    assert variants["cost"].tolist()[2] == pytest.approx(sum(variants["cost"].tolist()[:2]), rel=1e-6)
    gains = [row["gain"] for row in json.loads(result.stdout)["variants"]]
    assert gains[2] == pytest.approx(variants["accuracy"][2] - variants["accuracy"][0], abs=1e-6)


def test_crops_and_scales_are_counted(cli: Cli, runs: tuple[Path, Path], tmp_path: Path) -> None:
    result = cli("evaluate", runs[0], "--crops", 10, "--scales", "36,40", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert [row["views"] for row in json.loads(result.stdout)["variants"]] == [1, 20]
    assert "20" in result.stderr
    result = cli("evaluate", runs[0], "--scales", "20", "-o", tmp_path / "other")
    assert result.exit_code == 2
    assert not (tmp_path / "other").exists()


def test_classes_are_matched_by_name_not_by_index(
    cli: Cli, runs: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    """Return a model folder with its classes and classifier rows in another order."""
    other = shutil.copytree(runs[0] / "model", tmp_path / "turned")
    order = [2, 0, 1]
    weights = load_file(other / "model.safetensors")
    for name in ("fc.weight", "fc.bias"):
        weights[name] = weights[name][torch.tensor(order)].clone()
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    config = json.loads((other / "config.json").read_text())
    config["label_names"] = [config["label_names"][place] for place in order]
    config["finetune"]["sha256"] = ""
    (other / "config.json").write_text(json.dumps(config))
    result = cli("evaluate", other, "-d", data / "test", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    before = json.loads((runs[0] / "metrics.json").read_text())
    assert json.loads(result.stdout)["trained_on"] is None  # unknown for a model without its run
    assert "images are unknown" in (tmp_path / "out" / "report.html").read_text()
    assert json.loads(result.stdout)["loss"] == pytest.approx(before["loss"], abs=1e-4)
    result = cli("evaluate", runs[0], other, "-d", data / "test", "-o", tmp_path / "both", "--json")
    together = json.loads(result.stdout)
    assert together["variants"][2]["loss"] == pytest.approx(together["variants"][0]["loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--split", "tset"), "there is no such split"),
        (("--scales", "big"), "not numbers of pixels"),
        (("--crops", "3"), "number of crops is not supported"),
    ],
)
def test_invalid_options_are_refused(
    cli: Cli, runs: tuple[Path, Path], tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    result = cli("evaluate", runs[0], "-o", tmp_path / "out", *words)
    assert result.exit_code == 2
    assert said in result.stderr


def test_without_a_run_there_must_be_data(cli: Cli, runs: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(runs[0] / "model", tmp_path / "alone")
    result = cli("evaluate", tmp_path / "alone", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "--data" in result.stderr


def copy_run(run: Path, folder: Path) -> Path:
    return shutil.copytree(run, folder)


@pytest.mark.slow
def test_what_the_backbone_was_trained_on_counts_as_well(
    cli: Cli, runs: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    other = draw_folder(tmp_path / "other" / "test", dict.fromkeys(KINDS, 6)).parent
    (other / "test").rename(other / "flat")
    words = ("run", "-b", runs[0], "-d", other / "flat", "-s", "freeze", "--epochs", 1, *QUICK)
    assert cli(*words, "-o", tmp_path / "second").exit_code == 0
    (tmp_path / "fresh").symlink_to(data / "train")
    result = cli("evaluate", tmp_path / "second", "-d", tmp_path / "fresh", "-o", tmp_path / "out")
    assert result.exit_code == 65
    assert "it was trained on 24 of 24 images" in result.stderr
    result = cli("evaluate", tmp_path / "second", "-d", data / "val", "-o", tmp_path / "out", "--json")
    assert json.loads(result.stdout)["split_chose_checkpoint"] is True


def test_images_without_splits_are_called_all(
    cli: Cli, runs: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    result = cli("evaluate", runs[0], "-d", data / "test", "-o", tmp_path / "out", "--json")
    assert json.loads(result.stdout)["split"] == "all"
    split = pd.read_csv(tmp_path / "out" / "split.csv")
    assert list(split) == ["path", "label", "split", "sha256"]
    assert len(split) == 12


def test_images_that_fitted_the_temperature_are_cross_fitted(
    cli: Cli, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    result = cli("evaluate", runs[0], "--split", "val", "-o", tmp_path / "out", "--json")
    calibration = json.loads(result.stdout)["calibration"]
    assert calibration["same_images"] is True
    result = cli("evaluate", runs[0], "-o", tmp_path / "test", "--json")
    assert json.loads(result.stdout)["calibration"]["same_images"] is False


def test_a_mean_of_probabilities_has_no_uncalibrated_metrics(
    cli: Cli, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    calibration = json.loads(cli("evaluate", *runs, "-o", tmp_path / "out", "--json").stdout)["calibration"]
    assert "ece" not in calibration
    assert 0 <= calibration["ece_calibrated"] <= 1
    assert calibration["temperature"] is None


@pytest.mark.parametrize("change", slow_except(["other"], ["gone", "other"]))
def test_changed_images_of_a_run_are_refused(cli: Cli, tiny: Path, tmp_path: Path, change: str) -> None:
    data = draw_folder(tmp_path / "data", {"blue": 8, "red": 8})
    words = ("run", "-b", tiny, "-d", data, "-s", "freeze", "--epochs", 1, *QUICK)
    assert cli(*words, "-o", tmp_path / "run").exit_code == 0
    image = pd.read_csv(tmp_path / "run" / "predictions.csv")["path"][0]
    if change == "gone":
        (data / image).unlink()
    else:
        draw(data / image, (1, 2, 3), 5)
    result = cli("evaluate", tmp_path / "run", "-o", tmp_path / "out")
    assert result.exit_code == 65
    assert image in result.stderr
    assert ("cannot be found" if change == "gone" else "changed since the run") in result.stderr


@pytest.mark.slow
def test_a_test_split_added_later_may_be_evaluated(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    draw_folder(data / "train", {"blue": 8, "red": 8})
    words = ("run", "-b", tiny, "-d", data, "-s", "freeze", "--epochs", 1, *QUICK)
    assert cli(*words, "-o", tmp_path / "run").exit_code == 0
    draw_folder(data / "test", {"blue": 3, "red": 3})
    result = cli("evaluate", tmp_path / "run", "--split", "test", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["num_samples"] == 6


def test_a_run_without_metrics_has_unknown_training_images(
    cli: Cli, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    run = copy_run(runs[0], tmp_path / "run")
    (run / "metrics.json").write_text("{")
    result = cli("evaluate", run, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["split_chose_checkpoint"] is None
    assert "is not known" in result.stderr


def test_a_backbone_name_is_not_taken_for_a_folder(
    runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name has no parent folder, so the working directory is not its run."""
    from finetune.data.provenance import find_run

    monkeypatch.chdir(runs[0])
    assert find_run(Path("resnet50")) is None
    assert find_run(runs[0] / "model").path == runs[0]


def test_one_model_is_no_ensemble(cli: Cli, runs: tuple[Path, Path], tmp_path: Path) -> None:
    assert cli("evaluate", runs[0], runs[0], "-o", tmp_path / "out").exit_code == 2
