"""``finetune run --budget`` from the command line, on tiny backbones."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

import finetune
from finetune.errors import ExitCode
from finetune.pipeline.budget import candidates
from finetune.recipe import load_recipe
from finetune.system.display import SilentDisplay
from pretrained.catalog import find_card
from tests.conftest import COLOURS, Cli, draw_folder, make_tiny
from tests.faults.crash import open_crasher
from tests.faults.results import fault_of

WORDS = ("--device", "cpu", "--workers", 0, "--batch-size", 8, "--epochs", 3)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny backbone whose weights were trained at 64 pixels, so that a budget tries 64 and 32."""
    folder = make_tiny(tmp_path_factory.mktemp("larger") / "net")
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["input_size"] = [3, 64, 64]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def both_here(monkeypatch: pytest.MonkeyPatch, tiny: Path, larger: Path) -> None:
    """The weights of two backbones are on this machine."""
    cards = [find_card(str(folder), offline=True) for folder in (tiny, larger)]
    monkeypatch.setattr(candidates, "find_local", lambda: iter(cards))


def read(path: Path, name: str = "budget.json") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / name).read_text())
    return content


@pytest.mark.usefixtures("both_here")
def test_a_budget_finds_a_backbone_and_trains_it(
    cli: Cli, tiny: Path, larger: Path, image_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    words = ("run", "--budget", "5m", "-d", image_folder, "-o", output, *WORDS)
    result = cli(*words)
    assert result.exit_code == 0, result.output
    content, metrics, recipe = (
        read(output),
        read(output, "metrics.json"),
        load_recipe(str(output / "recipe.yaml")),
    )
    # Every input was scored, and a short fine-tuning judged.
    tried = {(row["backbone"], row["img_size"], row["features"]) for row in content["candidates"]}
    small, large = (find_card(str(folder), offline=True).name for folder in (tiny, larger))
    inputs = ((small, 32), (large, 64), (large, 32))
    assert tried == {(*one, features) for one in inputs for features in ("last", "all")}
    (tuned,) = (row for row in content["candidates"] if row["solved"] is not None)
    assert tuned["strategy"] == "full" and tuned["num_held"] >= 8
    assert tuned["solved"] > 0.8  # colours are easy, if each image has its own features and label
    # The run is that of the choice, and so is best.yaml.
    assert recipe.budget is None and recipe.strategy.name == content["chosen"]["strategy.name"]
    assert recipe.backbone.name == content["best"]["backbone"]
    assert load_recipe(str(output / "best.yaml")).strategy.name == recipe.strategy.name
    table = list(csv.DictReader((output / "budget.csv").open()))
    assert [row["score"] != "" for row in table] == [True] * len(content["candidates"])
    # What chose is beside what did not.
    figures = content["figures"]
    assert not metrics["split_chose_checkpoint"]
    assert figures["judged"]["accuracy"] == metrics["accuracy"] and figures["judged"]["num_images"] == 18
    assert figures["chose"]["accuracy"] == content["best"]["score"]
    assert figures["chose"]["num_candidates"] == 7
    assert f"budget: accuracy {metrics['accuracy']:.3f}" in result.output and "partly luck" in result.output
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "What 5m have tried" in page and f"{small}, 32 pixels, all features" in page
    assert "left-out training images, best of 7 candidates" in page
    # The same command has nothing to do; another one is refused.
    again = cli(*words)
    assert (
        again.exit_code == 0 and "the search of" in again.output and "already holds this run" in again.output
    )
    other = cli(*words, "--seed", 1)
    assert other.exit_code == ExitCode.USAGE and "a search with other settings" in other.output


def test_a_given_backbone_and_size_leave_one_input(tiny: Path, image_folder: Path, tmp_path: Path) -> None:
    """In Python, with a budget in which no fine-tuning fits."""
    run = finetune.run(
        data=image_folder,
        backbone=tiny,
        img_size="48",
        budget="45s",
        epochs=1,  # fewer than a fine-tuning has at least
        workers=0,
        output=tmp_path / "out",
        display=SilentDisplay(),
    )
    content = read(tmp_path / "out")
    assert {(row["backbone"], row["img_size"]) for row in content["candidates"]} == {(str(tiny), 48)}
    assert run.metrics["strategy"] == "freeze" and run.metrics["seconds"]["search"] > 0


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("--budget", "1s"), "the cheapest candidate"),
        (("--budget", "10"), "a duration of at least a second, such as 90s, 10m or 1h"),
        (("--budget", "0s"), "a duration"),
        (("--budget", "5m", "-s", "full"), "it chooses the strategy itself"),
        (("--budget", "5m", "--set", "strategy.probe_first=true"), "--budget sets this key itself"),
        (("--budget", "5m", "--repeats", 2), "a budget is for a single run"),
        (("--budget", "5m", "--folds", 2), "a budget is for a single run"),
        (("--budget", "5m", "--dry-run"), "a budget is for a single run"),
    ],
)
def test_refusals(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, words: tuple[object, ...], found: str
) -> None:
    result = cli("run", "-b", tiny, "-d", image_folder, "-o", tmp_path / "out", *WORDS, *words)
    assert result.exit_code == ExitCode.USAGE, result.output
    assert found in " ".join(result.output.split()) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("column", "labels", "found"), [("labels", "red|blue", "labels"), ("value", "", "number")]
)
def test_other_labels_are_refused(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, column: str, labels: str, found: str
) -> None:
    paths = sorted(path.relative_to(image_folder) for path in image_folder.rglob("*.jpg"))
    singles = [labels.partition("|")[0] or f"{number}" for number in range(len(paths))]
    others = [labels or one if number % 2 else one for number, one in enumerate(singles)]
    lines = [f"{path},{label}" for path, label in zip(paths, others, strict=True)]
    table = image_folder.parent / f"budget-{column}.csv"
    table.write_text("\n".join([f"path,{column}", *(f"images/{line}" for line in lines)]) + "\n")
    result = cli("run", "-b", tiny, "-d", table, "-o", tmp_path / "out", "--budget", "5m", *WORDS)
    assert result.exit_code == ExitCode.DATA, result.output
    assert found in result.output and "one class an image" in " ".join(result.output.split())


def test_a_folder_with_another_run_is_refused(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 1\n")
    result = cli("run", "-b", tiny, "-d", image_folder, "-o", tmp_path, "--budget", "5m", *WORDS)
    assert result.exit_code == ExitCode.USAGE and "a run without a budget" in result.output


@pytest.mark.slow
def test_killed_anywhere_the_same_command_ends_in_the_same_run(larger: Path, tmp_path: Path) -> None:
    """Killed at disk calls of search and run, it leaves whole files and ends in the same bits."""
    data = draw_folder(tmp_path / "data", dict.fromkeys(COLOURS, 12))

    def words_of(output: Path) -> list[object]:
        return ["run", "--budget", "20m", "-b", larger, "-d", data, "-o", output, *WORDS]

    with open_crasher() as crasher:
        end = crasher.run(*words_of(tmp_path / "whole"))
        assert end.code == 0, end.said
        num_searched = 0
        for number in range(0, len(end.calls), max(1, len(end.calls) // 12)):
            output = tmp_path / str(number)
            assert crasher.run(*words_of(output), kill=number).code < 0
            assert fault_of(output) == ""
            if (output / "budget.json").exists() and not (output / "recipe.yaml").exists():
                num_searched += 1
                if read(output)["best"] is not None:
                    assert load_recipe(str(output / "best.yaml")).backbone.name == str(larger)
            again = crasher.run(*words_of(output))
            assert again.code == 0, again.said
            assert read(output)["chosen"] == read(tmp_path / "whole")["chosen"]
            for name in ("model/model.safetensors", "predictions.csv", "recipe.yaml", "split.csv"):
                assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
            assert not list(output.rglob(".*"))
        assert num_searched > 1
