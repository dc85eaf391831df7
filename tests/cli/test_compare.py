"""``finetune compare``: claimed differences, warnings and refusals."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from finetune.errors import ExitCode
from finetune.runs.files import write_csv, write_json
from tests.conftest import Cli, FinishedRun, draw

Make = Callable[..., Path]

IMAGES = [(f"val/{name}/{number:02}.jpg", name) for name in ("ants", "bees") for number in range(40)]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write a folder like that of a finished run, with a number of wrong predictions."""

    def make_folder(
        name: str,
        wrong: Sequence[int] = (),
        images: Sequence[tuple[str, str]] = IMAGES,
        classes: Sequence[str] = ("ants", "bees"),
        digests: Mapping[str, str] | None = None,
        train: Sequence[tuple[str, str, str, str]] = (),
        **metrics: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        other = {"ants": "bees", "bees": "ants"}
        guesses = [
            (path, label, other[label] if number in wrong else label)
            for number, (path, label) in enumerate(images)
        ]
        rows = [(*row, 0.9, *(0.9 if one == row[2] else 0.1 for one in classes)) for row in guesses]
        write_csv(
            folder / "predictions.csv",
            rows,
            ("path", "label", "predicted", "confidence", *(f"prob_{one}" for one in classes)),
        )
        accuracy = 1 - len(wrong) / len(images)
        write_json(folder / "metrics.json", {"accuracy": accuracy, "split": "val"} | metrics)
        contents = digests or {}
        split = [(path, label, "val", contents.get(path, f"of {path}")) for path, label in images]
        write_csv(folder / "split.csv", [*split, *train], ("path", "label", "split", "sha256"))
        if train:
            (folder / "recipe.yaml").write_text("data:\n  path: x\n")
        return folder

    return make_folder


def test_two_runs_with_a_claimed_difference(cli: Cli, make: Make, tmp_path: Path) -> None:
    first = make("a", range(20), backbone="resnet50", strategy="freeze", loss=0.5)
    second = make("b", range(2), backbone="resnet50", strategy="full", f1_macro=0.97)
    result = cli("compare", first, second)
    assert result.exit_code == 0, result.output
    header, one, two, _, said = result.stdout.splitlines()
    assert header.split()[:3] == ["run", "backbone", "strategy"]
    assert one.split()[:4] == ["a", "resnet50", "freeze", "0.7500"]
    assert two.split()[:4] == ["b", "resnet50", "full", "0.9750"]
    assert said.startswith("b is better than a by 22.5 points (95 % interval ")
    assert said.endswith("McNemar p < 0.0001), on 80 images")
    assert result.stderr == ""
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_no_difference(cli: Cli, make: Make) -> None:
    result = cli("compare", make("a", range(5)), make("b", range(3, 7)), "--json")
    (pair,) = json.loads(result.stdout)["pairs"]
    assert (pair["only_first"], pair["only_second"], pair["claimed"]) == (2, 3, False)
    assert pair["sentence"].startswith("no difference can be claimed between a and b (b has 1.2 points more")


@pytest.mark.parametrize(("count", "pairs"), [(2, 1), (3, 3), (4, 6), (5, 4)])
def test_few_runs_are_compared_pairwise_and_many_with_the_first(
    cli: Cli, make: Make, count: int, pairs: int
) -> None:
    folders = [make(f"run{number}", range(number)) for number in range(count)]
    found = json.loads(cli("compare", *folders, "--json").stdout)["pairs"]
    assert len(found) == pairs
    assert all(pair["num_pairs"] == pairs for pair in found)
    assert {pair["first"] for pair in found} == ({"run0"} if count == 5 else {p["first"] for p in found})


def test_the_files_of_a_comparison(cli: Cli, make: Make, tmp_path: Path) -> None:
    first = make("a", range(20), intervals={"accuracy": [0.65, 0.84]}, seconds={"total": 12.5})
    write_csv(
        first / "plan.csv",
        [("body", "x", 70, False, 0, "none"), ("head", "head", 30, True, 0.1, "none")],
        ("group", "stage", "parameters", "trained", "rate", "norm"),
    )
    second = make("=b&<i>", range(2), calibration={"ece_calibrated": 0.03})
    output = tmp_path / "out"
    result = cli("compare", first, second, "-o", output, "--json")
    assert result.exit_code == 0, result.output
    assert {path.name for path in output.iterdir()} == {
        "runs.csv",
        "pairs.csv",
        "comparison.json",
        "comparison.svg",
    }
    assert json.loads((output / "comparison.json").read_text()) == json.loads(result.stdout)
    runs = pd.read_csv(output / "runs.csv")
    assert list(runs.run) == ["a", "'=b&<i>"]
    assert runs.learned[0] == 30 and runs.seconds[0] == 12.5 and runs.ece[1] == 0.03
    assert runs.accuracy_low[0] == 0.65
    pairs = pd.read_csv(output / "pairs.csv")
    assert list(pairs.claimed) == ["yes"] and pairs.difference[0] == pytest.approx(0.225)
    texts = [text.text for text in ElementTree.parse(output / "comparison.svg").iter() if text.text]
    assert "75.0 % (65.0 to 84.0)" in texts and "=b&<i> \u2212 a" in texts
    again = cli("compare", first, second, "-o", output)
    assert again.exit_code == ExitCode.USAGE and "not empty" in again.stderr


def test_real_runs(cli: Cli, finished_run: FinishedRun) -> None:
    runs = (finished_run("scratch"), finished_run("freeze"))
    result = cli("compare", *runs, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [row["images"] for row in found["runs"]] == [18, 18]
    assert all(row["learned"] > 0 and row["accuracy_low"] <= row["accuracy"] for row in found["runs"])
    one, two = (pd.read_csv(run / "predictions.csv") for run in runs)
    right_one, right_two = one.label == one.predicted, two.label == two.predicted
    (pair,) = found["pairs"]
    assert pair["only_first"] == (right_one & ~right_two).sum()
    assert pair["only_second"] == (right_two & ~right_one).sum()
    assert re.search("the images that .* (was|were) evaluated on also chose the epoch", result.stderr)


# --- warnings ------------------------------------------------------------------------------------


def warnings_of(cli: Cli, *folders: Path) -> str:
    result = cli("compare", *folders)
    assert result.exit_code == 0, result.output
    return result.stderr


def test_images_that_only_one_run_evaluated_are_left_out(cli: Cli, make: Make) -> None:
    said = warnings_of(cli, make("a", images=IMAGES[:70]), make("b", [65], images=IMAGES[10:]))
    assert "left out: 10 images of a alone and 10 images of b alone; compared: 60" in said


def test_a_split_that_chose_the_epoch_gives_a_warning(cli: Cli, make: Make) -> None:
    said = warnings_of(cli, make("a", split_chose_checkpoint=True), make("b", split_chose_checkpoint=False))
    assert "the images that a was evaluated on also chose the epoch" in said


def test_other_splits_and_training_images_give_warnings(cli: Cli, make: Make) -> None:
    said = warnings_of(cli, make("a"), make("b", split="test", trained_on=3))
    assert "the evaluated splits differ (a val, b test)" in said
    assert "b was trained on 3 of the images that it was evaluated on" in said


def test_different_training_images_give_a_warning(cli: Cli, make: Make) -> None:
    rows = [(f"train/{number}.jpg", "ants", "train", str(number)) for number in range(9)]
    first, second = make("a", train=rows[:6]), make("b", train=rows[2:])
    said = warnings_of(cli, first, second)
    assert "a and b were trained on different images (6 and 7, 4 of them in both)" in said
    assert warnings_of(cli, first, make("c", train=rows[:6])) == ""


def test_evaluated_images_do_not_count_as_training_images(cli: Cli, make: Make) -> None:
    """Its split.csv may call its images a training split."""
    rows = [(f"train/{number}.jpg", "ants", "train", str(number)) for number in range(9)]
    first, second = make("a", train=rows[:6]), make("b", train=rows[2:])
    (second / "recipe.yaml").unlink()
    assert warnings_of(cli, first, second) == ""


# --- refusals ------------------------------------------------------------------------------------


def refusal(cli: Cli, code: ExitCode, *folders: Path) -> str:
    result = cli("compare", *folders, "--json")
    assert result.exit_code == code, result.output
    assert json.loads(result.stdout)["exit_code"] == code
    return result.stderr


def test_invalid_comparisons_are_refused(cli: Cli, make: Make, tmp_path: Path) -> None:
    folder = make("a")
    assert "1 run was named" in refusal(cli, ExitCode.USAGE, folder)
    assert "given twice" in refusal(cli, ExitCode.USAGE, folder, tmp_path / "." / "a")
    assert "there is no such folder" in refusal(cli, ExitCode.USAGE, folder, tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    found = refusal(cli, ExitCode.USAGE, folder, tmp_path / "empty")
    assert "there is no metrics.json and no predictions.csv" in found


def test_different_classes_are_refused(cli: Cli, make: Make) -> None:
    other = make("b", images=IMAGES[:40], classes=("ants", "wasps"))
    found = refusal(cli, ExitCode.DATA, make("a"), other)
    assert "only one of them knows 'bees', 'wasps'" in found


def test_classes_in_another_order_are_the_same(cli: Cli, make: Make) -> None:
    assert cli("compare", make("a"), make("b", classes=("bees", "ants"))).exit_code == 0


def test_runs_without_a_common_image_are_refused(cli: Cli, make: Make) -> None:
    moved = [(f"elsewhere/{path}", label) for path, label in IMAGES]
    assert "they share no image" in refusal(cli, ExitCode.DATA, make("a"), make("b", images=moved))


def test_different_labels_are_refused(cli: Cli, make: Make) -> None:
    images = [(IMAGES[0][0], "bees"), *IMAGES[1:]]
    found = refusal(cli, ExitCode.DATA, make("a"), make("b", images=images))
    assert "val/ants/00.jpg has the labels 'ants' and 'bees'" in found


def test_different_images_of_the_same_name_are_refused(cli: Cli, make: Make) -> None:
    path = IMAGES[7][0]
    first, second = make("a", digests={path: "1"}), make("b", digests={path: "2"})
    found = refusal(cli, ExitCode.DATA, first, second)
    assert f"{path} is not the same image in both" in found
    assert cli("compare", make("c"), make("d")).exit_code == 0


@pytest.mark.parametrize("how", ["no file", "no cell", "no row", "no column"])
def test_images_of_unknown_content_are_not_compared(cli: Cli, make: Make, how: str) -> None:
    first, second = make("a"), make("b", digests={IMAGES[7][0]: ""} if how == "no cell" else None)
    split = second / "split.csv"
    if how == "no file":
        split.unlink()
    elif how == "no row":
        split.write_text("".join(split.read_text().splitlines(keepends=True)[:-1]))
    elif how == "no column":
        split.write_text(split.read_text().replace("sha256", "digest"))
    for folders in ((first, second), (second, first)):
        found = refusal(cli, ExitCode.DATA, *folders)
        assert str(second) in found
        assert "finetune evaluate" in found or how == "no column"


@pytest.mark.slow
def test_evaluations_of_different_images_of_the_same_names_are_refused(
    cli: Cli, tiny: Path, tmp_path: Path
) -> None:
    for name, seed in (("x", 1), ("y", 2), ("z", 1)):
        for label in range(2):
            draw(tmp_path / name / str(label) / "1.jpg", (90, 90, 90), seed=seed + 10 * label)
        result = cli("evaluate", tiny, "--data", tmp_path / name, "-o", tmp_path / f"of-{name}")
        assert result.exit_code == 0, result.output
    found = refusal(cli, ExitCode.DATA, tmp_path / "of-x", tmp_path / "of-y")
    assert "is not the same image in both" in found
    same = cli("compare", tmp_path / "of-x", tmp_path / "of-z", "--json")
    assert same.exit_code == 0, same.output
    (pair,) = json.loads(same.stdout)["pairs"]
    assert (pair["only_first"], pair["only_second"]) == (0, 0)
    assert pair["interval"][0] < -0.5 and pair["interval"][1] > 0.5


def test_an_unfinished_run_is_refused(cli: Cli, make: Make) -> None:
    folder = make("b")
    write_json(folder / "outcome.json", {"state": "interrupted"})
    assert "the run is not finished (interrupted); its metrics" in refusal(
        cli, ExitCode.DATA, make("a"), folder
    )


@pytest.mark.parametrize("state", ["interrupted", "failed", "running"])
def test_a_run_that_ended_before_its_first_metrics_is_no_foreign_folder(
    cli: Cli, make: Make, state: str
) -> None:
    folder = make("b")
    write_json(folder / "outcome.json", {"state": state})
    for name in ("metrics.json", "predictions.csv"):
        (folder / name).unlink()
    for folders in ((make("a"), folder), (folder, make("c"))):
        found = refusal(cli, ExitCode.DATA, *folders)
        assert f"the run is not finished ({state})" in found and "its metrics" not in found
        assert f"--output {folder}" in found


def test_metrics_that_contradict_the_predictions_are_refused(cli: Cli, make: Make) -> None:
    found = refusal(cli, ExitCode.DATA, make("a"), make("b", [1, 2], accuracy=0.99))
    assert "it says accuracy 0.9900, but predictions.csv gives 0.9750" in found


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.json", "{"),
        ("metrics.json", "[]"),
        ("metrics.json", '{"accuracy": null}'),
        ("metrics.json", '{"loss": 1}'),
        ("metrics.json", '{"accuracy": NaN}'),
        ("metrics.json", '{"accuracy": "1"}'),
        *(
            ("metrics.json", f'{{"accuracy": 1, {text}}}')
            for text in (
                '"intervals": 1',
                '"intervals": {"accuracy": [1]}',
                '"intervals": {"accuracy": "ab"}',
                '"intervals": {"accuracy": [0, "1"]}',
                '"loss": NaN',
                '"loss": [1]',
                f'"loss": 1{400 * "0"}',
                '"f1_macro": "1"',
                '"calibration": [1]',
                '"calibration": {"ece_calibrated": "x"}',
                '"seconds": {"total": {}}',
                '"models": 5',
                '"features": 5',
                '"split": ["val"]',
                '"backbone": {}',
                '"trained_on": "many"',
            )
        ),
        ("split.csv", "path,label,split,sha256\nval/ants/00.jpg,ants\n"),
        ("split.csv", "path,label,split,sha256\n1,2,3,4,5\n"),
        ("split.csv", 'path,label,split,sha256\n"1,2,3'),
        ("split.csv", "\x00\udcff"),
        ("predictions.csv", ""),
        ("predictions.csv", "path,label\n"),
        ("predictions.csv", "path,label,predicted,prob_ants,prob_bees\n"),
        ("predictions.csv", "path,label,predicted,prob_ants,prob_bees\nx\n"),
        ("predictions.csv", "path,label,predicted,prob_ants,prob_bees\nx,ants,ants\nx,ants,ants\n"),
        ("predictions.csv", "\x00\udcff"),
    ],
)
def test_damaged_files_are_refused(cli: Cli, make: Make, name: str, text: str) -> None:
    folder = make("b")
    (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    assert f"{name}: it cannot be read" in refusal(cli, ExitCode.DATA, make("a"), folder)


def test_a_damaged_plan_leaves_only_its_column_empty(cli: Cli, make: Make) -> None:
    folder = make("b")
    (folder / "plan.csv").write_text("group,stage,parameters,trained\nbody\n")
    result = cli("compare", make("a"), folder, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["runs"][1]["learned"] is None


def test_runs_of_the_same_name_are_shown_by_path(cli: Cli, make: Make) -> None:
    first, second = make("x/run", range(20)), make("y/run")
    said = cli("compare", first, second).stdout
    assert f"{second} is better than {first} by" in said


def test_names_do_not_depend_on_the_working_directory(
    cli: Cli, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make("a"))
    assert "between a and b" in cli("compare", ".", make("b")).stdout
