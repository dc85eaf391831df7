"""``finetune advise``, ``--strategy auto`` and solved heads, from the command line."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from finetune.errors import InterruptedRunError
from finetune.exporters.folder import load_exported
from finetune.features.store import KeptRows
from finetune.pipeline import fit as fitting
from finetune.training.trainer import Trainer
from tests.conftest import COLOURS, Cli, draw, draw_folder
from tests.sweeps import slow_except

WRITE_TABLES = "finetune.evaluation.single_label.SingleLabelJudge.write_tables"
WORDS = ("--device", "cpu", "--workers", 0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(cli: Cli, tiny: Path, data: Path, output: Path, *words: object) -> dict[str, Any]:
    result = cli("run", "-b", tiny, "-d", data, "-o", output, *WORDS, *words)
    assert result.exit_code == 0, result.stderr
    metrics: dict[str, Any] = json.loads((output / "metrics.json").read_text())
    return metrics


# --- solved heads --------------------------------------------------------------------------------


def features_of(cli: Cli, tiny: Path, data: Path, path: Path, layers: str) -> pd.DataFrame:
    assert cli("extract", "-b", tiny, "-d", data, "-o", path, "-l", layers, *WORDS).exit_code == 0
    return pd.read_csv(path)


@pytest.mark.slow
@pytest.mark.parametrize("layers", slow_except(["all"], ["last", "layer1", "all"]))
def test_a_solved_head_equals_the_optimum_of_scikit_learn(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, layers: str
) -> None:
    words = ("--strategy", "freeze", "--set", f"strategy.features={layers}")
    metrics = run(cli, tiny, image_folder, tmp_path / "run", *words)
    table = features_of(cli, tiny, image_folder, tmp_path / "f.csv", layers)
    train, val = table[table["split"] == "train"], table[table["split"] == "val"]
    mean, std = train.iloc[:, 3:].mean(), train.iloc[:, 3:].std(ddof=0)
    std = np.maximum(std, 0.1 * std.mean())
    oracle = LogisticRegression(C=metrics["regularisation"], max_iter=10_000, tol=1e-8)
    oracle.fit((train.iloc[:, 3:] - mean) / std, train["label"])
    wanted = oracle.predict_proba((val.iloc[:, 3:] - mean) / std)
    rows = pd.read_csv(tmp_path / "run/predictions.csv").set_index("path").loc[val["path"]]
    given = rows[[f"prob_{name}" for name in oracle.classes_]].to_numpy()
    assert np.abs(given - wanted).max() < 5e-3
    assert metrics["epochs"] == 0 and metrics["split_chose_checkpoint"] is False


@pytest.mark.slow
@pytest.mark.parametrize("layers", slow_except(["all"], ["last", "layer1", "all"]))
def test_the_exported_model_gives_the_predictions_of_the_metrics(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, layers: str
) -> None:
    from timm.data import create_transform

    from pretrained.catalog import find_card

    words = ("--strategy", "freeze", "--set", f"strategy.features={layers}")
    run(cli, tiny, image_folder, tmp_path / "run", *words)
    network = load_exported(tmp_path / "run/model")
    card = find_card(str(tmp_path / "run"))
    view = create_transform(**card.preprocessing.to_timm(), is_training=False)
    with (tmp_path / "run/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))[::5]
    for row in rows:
        with Image.open(image_folder / row["path"]) as image, torch.no_grad():
            said = network(view(image.convert("RGB")).unsqueeze(0)).softmax(1)[0]
        wanted = [float(row[f"prob_{name}"]) for name in card.label_names]
        assert np.allclose(said.numpy(), wanted, atol=1e-3)


@pytest.mark.slow
def test_a_solved_run_can_be_given_more_epochs(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    words = ("--strategy", "freeze", "--set", "strategy.features=last")
    before = run(cli, tiny, image_folder, tmp_path / "run", *words)
    assert run(cli, tiny, image_folder, tmp_path / "run", *words, "--epochs", 20)["loss"] == before["loss"]


@pytest.mark.parametrize("command", ["probe", "map", "advise"])
def test_nothing_is_written_among_the_images(cli: Cli, tiny: Path, image_folder: Path, command: str) -> None:
    words = ("--per-class", 3) if command == "probe" else ()
    result = cli(command, "-b", tiny, "-d", image_folder, "-o", image_folder / "out", *words, *WORDS)
    assert result.exit_code == 2 and "lies in the data" in result.stderr
    assert not (image_folder / "out").exists()


@pytest.mark.slow
def test_a_backbone_without_a_classifier_is_advised_by_depth(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny, tmp_path / "encoder")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_classes": 0}))
    result = cli("advise", "-b", other, "-d", image_folder, "--json", *WORDS)
    assert result.exit_code == 0, result.stderr
    advice = json.loads(result.stdout)
    assert advice["normalised_leep"] is None and advice["similarity"] in ("unsure", "different")


@pytest.mark.slow
def test_a_classifier_on_stages_gives_features_and_advice(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    run(
        cli, tiny, image_folder, tmp_path / "one", "--strategy", "freeze", "--set", "strategy.features=layer2"
    )
    result = cli("extract", "-b", tmp_path / "one", "-d", image_folder, "-o", tmp_path / "f.csv", *WORDS)
    assert result.exit_code == 0, result.stderr
    run(cli, tmp_path / "one", image_folder, tmp_path / "auto", "--strategy", "auto")
    words = ("--strategy", "freeze", "--set", "strategy.features=all", "-o", tmp_path / "no")
    result = cli("run", "-b", tmp_path / "one", "-d", image_folder, *WORDS, *words)
    assert result.exit_code == 2 and "already a classifier on several stages" in result.stderr


@pytest.mark.slow
def test_a_classifier_on_stages_is_the_backbone_of_the_next_run(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    words = ("--strategy", "freeze", "--set", "strategy.features=all")
    before = run(cli, tiny, image_folder, tmp_path / "one", *words)
    kept = run(
        cli, tmp_path / "one", image_folder, tmp_path / "two", "--strategy", "full",
        "--epochs", 1, "--lr", 1e-7, "--set", "strategy.head=keep",
    )  # fmt: skip
    assert kept["accuracy"] == pytest.approx(before["accuracy"], abs=0.06)
    other = draw_folder(tmp_path / "other", {"blue": 12, "red": 12})
    run(cli, tmp_path / "one", other, tmp_path / "three", "--strategy", "top", "--epochs", 1, "--allow-leaks")


@pytest.mark.slow
def test_best_is_chosen_without_validation_images(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    words = ("--strategy", "freeze", "--set", "strategy.features=best")
    one = run(cli, tiny, image_folder, tmp_path / "one", *words)
    shutil.copytree(image_folder, tmp_path / "data")
    folders = [tmp_path / "data/val" / name for name in COLOURS]
    for folder, other in zip(folders, folders[1:] + folders[:1], strict=True):
        folder.rename(folder.with_name(f"{other.name}-new"))
    for name in COLOURS:
        (tmp_path / f"data/val/{name}-new").rename(tmp_path / f"data/val/{name}")
    two = run(cli, tiny, tmp_path / "data", tmp_path / "two", *words)
    assert (one["features"], one["regularisation"]) == (two["features"], two["regularisation"])
    assert one["accuracy"] > two["accuracy"]


def test_a_killed_solve_resumes_to_the_same_bits(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--strategy", "freeze", "--set", "strategy.features=all")
    run(cli, tiny, image_folder, tmp_path / "whole", *words)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache2"))
    for place in (
        "finetune.pipeline.linear_head.fit",
        WRITE_TABLES,
    ):
        with mock.patch(place, side_effect=KeyboardInterrupt):
            assert (
                cli("run", "-b", tiny, "-d", image_folder, "-o", tmp_path / "cut", *WORDS, *words).exit_code
                == 75
            )
    with mock.patch.object(KeptRows, "_compute", side_effect=AssertionError("computed again")):
        run(cli, tiny, image_folder, tmp_path / "cut", *words)
    for name in ("predictions.csv", "model/model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--strategy", "top", "--set", "strategy.features=last"), "Take --strategy freeze"),
        (("--strategy", "freeze", "--set", "strategy.floor=last"), "fine-tunes no pretrained stage"),
        (("--strategy", "scratch", "--set", "strategy.probe_first=true"), "fine-tunes no pretrained stage"),
        (("--strategy", "freeze", "--set", "strategy.features=layr4"), "did you mean 'layer4'"),
        (("--strategy", "auto", "--set", "strategy.features=last"), "sets this key itself"),
        (("--strategy", "auto", "--set", "strategy.head=keep"), "new linear classifier"),
        (("--strategy", "auto", "--set", "strategy.head_factor=0.5"), "sets this key itself"),
        (("--strategy", "freeze", "--set", "strategy.features=fc"), "is the classifier"),
        (("--strategy", "top", "--set", "strategy.floor=layr4"), "strategy.floor=layr4"),
    ],
)
def test_contradictory_keys_are_refused(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    result = cli("run", "-b", tiny, "-d", image_folder, "-o", tmp_path / "run", *WORDS, *words)
    assert result.exit_code == 2 and said in result.stderr, result.stderr
    assert not (tmp_path / "run").exists()


# --- the floor, and a head that begins as a solution ----------------------------------------------


@pytest.mark.slow
def test_a_network_worse_than_its_floor_is_not_exported(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    words = ("--strategy", "full", "--epochs", 1, "--lr", 1e-7, "--set", "strategy.floor=all")
    floored = run(cli, tiny, image_folder, tmp_path / "floor", *words)
    solved = run(
        cli, tiny, image_folder, tmp_path / "all", "--strategy", "freeze", "--set", "strategy.features=all"
    )
    assert floored["features"] == solved["features"] and floored["epochs"] == 0
    assert floored["accuracy"] == solved["accuracy"]
    assert floored["split_chose_checkpoint"] is True  # validation images chose between the two
    weights = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("floor", "all")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_network_better_than_its_floor_is_exported(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    with mock.patch.object(fitting, "_beats", return_value=True):
        metrics = run(
            cli,
            tiny,
            image_folder,
            tmp_path / "run",
            "--strategy",
            "top",
            "--epochs",
            1,
            "--set",
            "strategy.floor=last",
        )
    assert metrics["epochs"] == 1 and metrics["features"] is None


@pytest.mark.slow
def test_a_head_starts_as_the_solved_classifier(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    solved = run(
        cli,
        tiny,
        image_folder,
        tmp_path / "solved",
        "--strategy",
        "freeze",
        "--set",
        "strategy.features=last",
    )
    started = run(
        cli, tiny, image_folder, tmp_path / "run", "--strategy", "top", "--epochs", 1, "--lr", 1e-9,
        "--set", "strategy.probe_first=true", "--set", "strategy.norm=eval",
    )  # fmt: skip
    assert started["epochs"] == 1
    assert started["val_loss"] == pytest.approx(solved["val_loss"], abs=2e-3)


class Stopping(Trainer):
    """A trainer that is asked to stop after four steps."""

    def __init__(self, *arguments: Any, **keys: Any) -> None:
        steps = iter([False] * 4)
        super().__init__(*arguments, **keys | {"stop_asked": lambda: next(steps, True)})


@pytest.mark.slow
def test_a_run_with_a_floor_resumes_to_the_same_bits(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    words = ("--strategy", "top", "--epochs", 3)
    words += ("--set", "strategy.probe_first=true", "--set", "strategy.floor=all")
    run(cli, tiny, image_folder, tmp_path / "whole", *words)
    with mock.patch.object(fitting, "Trainer", Stopping):
        result = cli("run", "-b", tiny, "-d", image_folder, "-o", tmp_path / "cut", *WORDS, *words)
    assert result.exit_code == 75, result.stderr
    run(cli, tiny, image_folder, tmp_path / "cut", *words)
    for name in ("predictions.csv", "model/model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# --- advice --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_advice_gives_the_position_in_the_matrix(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.features.network.LEAST_SOURCE_CLASSES", 10)
    result = cli("advise", "-b", tiny, "-d", image_folder, "-o", tmp_path / "advice", *WORDS)
    assert result.exit_code == 0, result.stderr
    assert "-> little," in result.stdout and "What would change this" in result.stdout
    advice = json.loads((tmp_path / "advice/advice.json").read_text())
    assert advice["size"] == "little" and advice["num_images"] == 36 and advice["num_classes"] == 3
    assert advice["strategy"]["name"] == "freeze"
    assert -1 < advice["normalised_leep"] <= 1
    assert [depth["layer"] for depth in advice["depths"]][-1] == "layer4"
    assert advice["num_trained"]["freeze"] < advice["num_trained"]["top"] < advice["num_trained"]["full"]
    for name in ("probe.png", "matrix.png"):
        assert Image.open(tmp_path / "advice" / name).size[0] > 500


@pytest.mark.slow
def test_auto_trains_with_the_advice_and_computes_it_once(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    advised = json.loads(cli("advise", "-b", tiny, "-d", image_folder, "--json", *WORDS).stdout)
    seen: list[str] = []
    rows = KeptRows.rows

    def spy(self: KeptRows, *arguments: Any) -> Any:
        before = self.num_computed
        found = rows(self, *arguments)
        seen.extend([str(arguments[-1])] * (self.num_computed > before))
        return found

    with mock.patch.object(KeptRows, "rows", spy):
        metrics = run(cli, tiny, image_folder, tmp_path / "run", "--strategy", "auto")
    assert set(seen) == {"features of val images"}  # those of training images were cached
    saved = json.loads((tmp_path / "run/advice.json").read_text())
    assert saved["strategy"] == advised["strategy"]
    recipe = (tmp_path / "run/recipe.yaml").read_text()
    assert "name: freeze" in recipe and f"features: {advised['strategy']['features']}" in recipe
    assert metrics["features"] is not None


@pytest.mark.slow
def test_auto_keeps_its_strategy_on_resume(cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path) -> None:
    words = ("run", "-b", tiny, "-d", image_folder, "-o", tmp_path / "run", *WORDS, "--strategy", "auto")
    with mock.patch(WRITE_TABLES, side_effect=KeyboardInterrupt):
        assert cli(*words).exit_code == 75
    with mock.patch("finetune.pipeline.auto.advise", side_effect=AssertionError("decided again")):
        assert cli(*words).exit_code == 0
        assert "finished" in cli(*words).stderr  # a second time too


@pytest.mark.slow
def test_a_brief_training_can_overrule_the_rule(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    result = cli("advise", "-b", tiny, "-d", image_folder, "--json", "--set", "advise.verify=true", *WORDS)
    assert result.exit_code == 0, result.stderr
    advice = json.loads(result.stdout)
    top, linear = advice["verified"]["top"], advice["verified"]["freeze"]
    assert 0 < top <= 1 and 0 < linear <= 1
    assert advice["strategy"]["name"] == ("top" if top > linear else "freeze")
    with mock.patch("finetune.pipeline.verify._try_top", return_value=1.01):
        result = cli(
            "advise", "-b", tiny, "-d", image_folder, "--json", "--set", "advise.verify=true", *WORDS
        )
    strategy = json.loads(result.stdout)["strategy"]
    assert strategy["name"] == "top" and strategy["probe_first"] and strategy["floor"]


@pytest.mark.slow
def test_shuffled_labels_are_flagged(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    names = ["blue", "green", "red"]
    for number in range(45):
        colour = COLOURS[names[number % 3]]
        draw(tmp_path / "data" / names[number // 15] / f"{number:03}.jpg", colour, number)
    advice = json.loads(cli("advise", "-b", tiny, "-d", tmp_path / "data", "--json", *WORDS).stdout)
    assert advice["strategy"]["name"] == "freeze"
    assert any("check the labels" in warning for warning in advice["warnings"])


def test_backbones_are_ranked_by_neighbours(cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny, tmp_path / "worse")
    from safetensors.torch import load_file, save_file

    state = load_file(other / "model.safetensors")
    save_file({key: torch.zeros_like(value) if "layer4" in key else value for key, value in state.items()},
              other / "model.safetensors")  # fmt: skip
    result = cli("advise", "--backbones", f"{other},{tiny}", "-d", image_folder, "--json", *WORDS)
    assert result.exit_code == 0, result.stderr
    ranked = json.loads(result.stdout)
    assert [str(tiny) in one["backbone"] for one in ranked] == [True, False]
    assert ranked[0]["score"] > ranked[1]["score"] and ranked[0]["metric"] == "accuracy"


@pytest.mark.parametrize("command", ["advise", "probe"])
def test_images_without_labels_are_refused(cli: Cli, tiny: Path, tmp_path: Path, command: str) -> None:
    draw_folder(tmp_path / "data", {"one": 3})
    result = cli(command, "-b", tiny, "-d", tmp_path / "data", "-o", tmp_path / "out", *WORDS)
    assert result.exit_code == 65 and "no image has a label" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_interrupted_advice_leaves_no_files(cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path) -> None:
    error = InterruptedRunError("the run", "it was stopped", "Again.")
    with mock.patch("finetune.pipeline.advise.decide", side_effect=error):
        result = cli("advise", "-b", tiny, "-d", image_folder, "-o", tmp_path / "out", *WORDS)
    assert result.exit_code == 75 and not (tmp_path / "out").exists()
