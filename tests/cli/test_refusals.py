"""Errors that a user can cause: one clear message, the documented exit code, no traceback."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from finetune.errors import ExitCode
from tests.conftest import Cli, draw, draw_folder
from tests.sweeps import slow_except

QUICK = ("--workers", 0, "--epochs", 1, "--batch-size", 8)


def refused(cli: Cli, code: ExitCode, *words: object) -> str:
    """Run a command that must be refused, and return its message."""
    result = cli(*words)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert result.stdout == ""
    return " ".join(result.stderr.split())


@pytest.fixture
def run_words(image_folder: Path, tiny: Path, tmp_path: Path) -> list[object]:
    return ["run", "-b", tiny, "-d", image_folder, "-o", tmp_path / "run", *QUICK]


# --- usage: 2 ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--strategy", "frieze"], "did you mean 'freeze'?"),
        (["--epochs", "0"], "`training.epochs` is 0; it must be a whole number of at least 1"),
        (["--epochs", "-3"], "`training.epochs` is -3"),
        (["--lr", "-1"], "`training.lr` is -1.0; it must be a number above 0"),
        (["--batch-size", "0"], "`training.batch_size` is 0"),
        (["--val-fraction", "1.5"], "`data.val_fraction` is 1.5"),
        (["--seed", "-1"], "`seed` is -1"),
        (["--set", "training.learning_rate=1"], "did you mean `training.lr`?"),
        (["--set", "trainig.lr=1"], "there is no `trainig`"),
        (["--set", "training.lr"], "there is no `=`"),
        (["--lr", "0.1", "--set", "training.lr=0.2"], "Give it once"),
        (["--recipe", "topp"], "did you mean 'top'"),
        (["--recipe", "/nowhere/x.yaml"], "no such file"),
        (["--device", "tpu"], "there is no such device"),
        (["--weights", "/nowhere/w.safetensors"], "there is no such file or folder"),
        (["--set", "strategy.head=drop_fc"], "no fully connected layers"),
        (["--set", "strategy.head=keep"], "10 outputs, the data 3 classes"),
        (["--set", "strategy.top_stages=99"], "stages under its head"),
        (["--strategy", "scratch", "--weights", "x.pth"], "Drop one of the two"),
        (["--set", "training.nesterov=true", "--optimizer", "adamw"], "adamw has no Nesterov momentum"),
    ],
)
def test_wrong_usage(cli: Cli, run_words: list[object], tmp_path: Path, words: list[str], said: str) -> None:
    plain = [word for word in run_words if "--epochs" not in words or word not in ("--epochs", 1)]
    assert said in refused(cli, ExitCode.USAGE, *plain, *words)


def test_unknown_options_and_commands_are_refused(cli: Cli, run_words: list[object]) -> None:
    assert cli(*run_words, "--epoch", "3").exit_code == ExitCode.USAGE
    assert cli("rum").exit_code == ExitCode.USAGE
    assert cli(*run_words, "--batch-size", "many").exit_code == ExitCode.USAGE


def test_unknown_backbone_names_the_nearest(cli: Cli, image_folder: Path) -> None:
    said = refused(cli, ExitCode.USAGE, "run", "-b", "resnet5", "-d", image_folder)
    assert "did you mean 'resnet50'" in said


def test_data_are_needed(cli: Cli) -> None:
    assert "Add --data" in refused(cli, ExitCode.USAGE, "run", "-b", "resnet18")


def test_weights_of_another_network(cli: Cli, run_words: list[object], tmp_path: Path) -> None:
    import timm

    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    said = refused(cli, ExitCode.USAGE, *run_words, "--weights", tmp_path / "vit.safetensors")
    assert "under 90 %" in said
    assert "the file holds 80 tensors whose names begin with 'blocks'" in said


@pytest.mark.slow
def test_an_output_folder_with_another_run(cli: Cli, run_words: list[object]) -> None:
    assert cli(*run_words).exit_code == 0
    said = refused(cli, ExitCode.USAGE, *run_words, "--lr", "0.5")
    assert "it holds another run" in said
    assert "training.lr: 0.01 -> 0.5" in said


def test_an_output_folder_with_other_files(cli: Cli, run_words: list[object], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    assert "thesis.tex" in refused(cli, ExitCode.USAGE, *run_words)
    assert (tmp_path / "run" / "thesis.tex").read_text() == "precious"


# --- data: 65 ------------------------------------------------------------------------------------


def refused_data(cli: Cli, tiny: Path, data: Path, output: Path) -> str:
    return refused(cli, ExitCode.DATA, "run", "-b", tiny, "-d", data, "-o", output, *QUICK)


def test_a_missing_path_is_refused(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    assert "nowhere" in refused_data(cli, tiny, tmp_path / "nowhere", tmp_path / "run")


def test_an_empty_folder(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    refused_data(cli, tiny, tmp_path / "data", tmp_path / "run")


def test_one_class(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    assert "class" in refused_data(cli, tiny, draw_folder(tmp_path / "data", {"red": 5}), tmp_path / "run")


def test_a_class_with_one_image(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "data", {"red": 5, "blue": 1})
    assert "blue" in refused_data(cli, tiny, data, tmp_path / "run")


@pytest.mark.parametrize("fault", slow_except(["truncated"], ["truncated", "empty", "html", "noise"]))
@pytest.mark.parametrize("part", ["train", "val"])
def test_unreadable_images(cli: Cli, tiny: Path, tmp_path: Path, fault: str, part: str) -> None:
    for name in ("train", "val"):
        draw_folder(tmp_path / "data" / name, {"red": 5, "blue": 5})
    path = tmp_path / "data" / part / "red" / "003.jpg"
    whole = path.read_bytes()
    content = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "html": b"<!DOCTYPE html>",
        "noise": os.urandom(200),
    }
    path.write_bytes(content[fault])
    said = refused_data(cli, tiny, tmp_path / "data", tmp_path / "run")
    assert f"{part}/red/003.jpg" in said
    listed = (tmp_path / "run" / "bad_images.csv").read_text()
    assert f"{part}/red/003.jpg,{part}," in listed
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert (outcome["state"], outcome["exit_code"]) == ("failed", 65)
    assert outcome["hint"]


@pytest.mark.slow
def test_one_bad_image_in_many_is_listed_and_left_out(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    draw_folder(tmp_path / "data" / "train", {"red": 60, "blue": 60})
    draw_folder(tmp_path / "data" / "val", {"red": 2, "blue": 2})
    (tmp_path / "data" / "train" / "red" / "007.jpg").write_bytes(b"")
    result = cli("run", "-b", tiny, "-d", tmp_path / "data", "-o", tmp_path / "run", *QUICK)
    assert result.exit_code == 0, result.output
    assert "train/red/007.jpg" in result.stderr
    assert "train/red/007.jpg" not in (tmp_path / "run" / "split.csv").read_text()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["num_train"] == 119


def test_a_label_that_leaves_its_folder(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    draw(tmp_path / "a.jpg", (1, 2, 3), 0)
    (tmp_path / "data.csv").write_text("path,label\na.jpg,../x\na.jpg,y\n")
    assert "../x" in refused_data(cli, tiny, tmp_path / "data.csv", tmp_path / "run")


@pytest.mark.slow
def test_a_class_that_looks_like_a_formula_is_only_text(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "data", {"=cmd()": 4, "red": 4})
    result = cli("run", "-b", tiny, "-d", data, "-o", tmp_path / "run", *QUICK)
    assert result.exit_code == 0, result.output
    for table in (tmp_path / "run").glob("*.csv"):
        cells = [cell for line in table.read_text().splitlines() for cell in line.split(",")]
        assert not any(cell.startswith("=") for cell in cells), table.name
    assert "=cmd()" in (tmp_path / "run" / "classes.txt").read_text().splitlines()


# --- environment: 78, disk: 74 -------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device(cli: Cli, run_words: list[object]) -> None:
    assert "--device cpu" in refused(cli, ExitCode.ENVIRONMENT, *run_words, "--device", "cuda")


def test_missing_weights_are_refused_offline(
    cli: Cli, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    said = refused(cli, ExitCode.ENVIRONMENT, "run", "-b", "squeezenet1_1", "-d", image_folder, "--offline")
    assert "squeezenet1_1-b8a52dc0.pth" in said
    assert str(tmp_path / "cache") in said
    assert "FINETUNE_MIRROR" in said
    said = refused(cli, ExitCode.ENVIRONMENT, "run", "-b", "resnet18", "-d", image_folder, "--offline")
    assert "model.safetensors" in said
    assert "HF_ENDPOINT" in said


def test_an_output_that_cannot_be_written(cli: Cli, run_words: list[object]) -> None:
    assert "/proc" in refused(cli, ExitCode.DISK, *run_words, "-o", "/proc/nowhere/run")


# --- json, internal errors -----------------------------------------------------------------------


def test_json_prints_one_object_after_an_error_too(cli: Cli, run_words: list[object]) -> None:
    result = cli(*run_words, "--lr", "-1", "--json")
    assert result.exit_code == ExitCode.USAGE
    outcome = json.loads(result.stdout)
    assert (outcome["state"], outcome["exit_code"]) == ("failed", 2)


def test_an_internal_error_is_reported_and_logged(
    cli: Cli, run_words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*_: object) -> None:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr("finetune.targets.single_label.build_loss", break_down)
    said = refused(cli, ExitCode.INTERNAL, *run_words)
    assert "ZeroDivisionError: on purpose" in said
    assert "Traceback" in (tmp_path / "run" / "run.log").read_text()
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["exit_code"] == 70


def test_a_huge_learning_rate_diverges_with_its_own_exit_code(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    words = ["run", "-b", tiny, "-d", image_folder, "-o", tmp_path / "run", "-s", "scratch", "--workers", 0]
    said = refused(cli, ExitCode.DIVERGED, *words, "--batch-size", 4, "--epochs", 5, "--lr", 1e30)
    assert "with a learning rate of" in said
    assert (tmp_path / "run" / "diverged.safetensors").is_file()


def test_cmyk_and_16_bit_images_train(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "data", {"red": 4, "blue": 4})
    Image.new("CMYK", (40, 40), (0, 200, 200, 0)).save(data / "red" / "cmyk.jpg")
    Image.new("I;16", (40, 40), 30000).save(data / "blue" / "deep.png")
    result = cli("run", "-b", tiny, "-d", data, "-o", tmp_path / "run", *QUICK)
    assert result.exit_code == 0, result.output


# --- the folder of a run that has begun ----------------------------------------------------------


@pytest.mark.slow
def test_a_second_process_is_kept_out(cli: Cli, run_words: list[object], tmp_path: Path) -> None:
    from finetune.runs.claim import locked

    assert cli(*run_words).exit_code == 0
    with locked(tmp_path / "run"):
        assert "another process is working in it" in refused(cli, ExitCode.USAGE, *run_words)
    assert cli(*run_words).exit_code == 0


def start_and_fail(cli: Cli, words: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave an unfinished run."""
    with monkeypatch.context() as patch:
        patch.setattr("finetune.training.trainer.Trainer.fit", lambda _: 1 / 0)
        assert cli(*words).exit_code == ExitCode.INTERNAL


@pytest.mark.slow
@pytest.mark.parametrize("finished", slow_except([False], [True, False]))
def test_changed_images_are_detected(
    cli: Cli, tiny: Path, tmp_path: Path, finished: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = draw_folder(tmp_path / "data", {"red": 6, "blue": 6})
    words = ["run", "-b", tiny, "-d", data, "-o", tmp_path / "run", *QUICK]
    if finished:
        assert cli(*words).exit_code == 0
    else:
        start_and_fail(cli, words, monkeypatch)
    draw(data / "red" / "new.jpg", (200, 0, 0), seed=99)
    said = refused(cli, ExitCode.DATA, *words)
    assert "1 new, red/new.jpg for one" in said
    (data / "red" / "000.jpg").rename(tmp_path / "kept.jpg")
    (data / "red" / "new.jpg").rename(data / "red" / "000.jpg")  # replaced under the same name
    assert "1 with another content, red/000.jpg for one" in refused(cli, ExitCode.DATA, *words)
    (tmp_path / "kept.jpg").rename(data / "red" / "000.jpg")
    assert cli(*words).exit_code == 0
    (data / "red" / "001.jpg").rename(data / "blue" / "001x.jpg")
    assert "1 gone, red/001.jpg for one" in refused(cli, ExitCode.DATA, *words)


@pytest.mark.slow
def test_a_repaired_image_is_no_longer_listed(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "data", {"red": 6, "blue": 6})
    whole = (data / "red" / "002.jpg").read_bytes()
    (data / "red" / "002.jpg").write_bytes(b"")
    refused_data(cli, tiny, data, tmp_path / "run")
    assert (tmp_path / "run" / "bad_images.csv").exists()
    (data / "red" / "002.jpg").write_bytes(whole)
    assert cli("run", "-b", tiny, "-d", data, "-o", tmp_path / "run", *QUICK).exit_code == 0
    assert not (tmp_path / "run" / "bad_images.csv").exists()


@pytest.mark.slow
def test_another_number_of_workers_is_the_same_run(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["run", "-b", tiny, "-d", image_folder, "-o", tmp_path / "run", "--epochs", 1, "--batch-size", 8]
    start_and_fail(cli, [*words, "--workers", 1], monkeypatch)
    assert cli(*words, "--workers", 0).exit_code == 0


def test_early_refusals_leave_no_folder(cli: Cli, run_words: list[object], tmp_path: Path) -> None:
    refused(cli, ExitCode.USAGE, *run_words, "--set", "strategy.top_stages=99")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_finished_run_without_metrics_is_refused(cli: Cli, run_words: list[object], tmp_path: Path) -> None:
    assert cli(*run_words).exit_code == 0
    (tmp_path / "run" / "metrics.json").unlink()
    assert "metrics.json" in refused(cli, ExitCode.DATA, *run_words)


@pytest.mark.sample(1)
@pytest.mark.parametrize("inside", ["", "runs/a", "train/red"])
def test_nothing_is_ever_written_among_the_images(
    cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    data = draw_folder(tmp_path / "data", {"train/red": 3, "train/blue": 3, "val/red": 1, "val/blue": 1})
    before = sorted(data.rglob("*"))
    assert "it lies in the data" in refused(
        cli, ExitCode.USAGE, "run", "-b", tiny, "-d", data, "-o", data / inside, *QUICK
    )
    monkeypatch.chdir(data)  # the default output is relative
    assert "it lies in the data" in refused(cli, ExitCode.USAGE, "run", "-b", tiny, "-d", ".", *QUICK)
    assert sorted(data.rglob("*")) == before


@pytest.mark.slow
def test_a_run_may_be_beside_a_csv_but_not_among_its_images(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    rows = [f"img/{name}/{number:03}.jpg,{name}" for name in ("red", "blue") for number in range(4)]
    draw_folder(tmp_path / "img", {"red": 4, "blue": 4})
    (tmp_path / "data.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    words = ["run", "-b", tiny, "-d", tmp_path / "data.csv", *QUICK]
    assert "it lies in the data" in refused(cli, ExitCode.USAGE, *words, "-o", tmp_path / "img" / "run")
    assert cli(*words, "-o", tmp_path / "run").exit_code == 0


def test_a_folder_named_like_the_backbone_does_not_hide_it(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "squeezenet1_1").mkdir()
    result = cli("backbones", "show", "squeezenet1_1", "--json")
    assert json.loads(result.stdout)["name"].startswith("torchvision/")


# --- values that the parser refuses --------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "--lr", "0,01"], "'--lr': '0,01' is not a number; write 0.01"),
        (["run", "--lr=1,000.5"], "'--lr': '1,000.5' is not a number"),
        (["run", "--lr", "high"], "'--lr': 'high' is not a number"),
        (["run", "--val-fraction", "0,2"], "'--val-fraction': '0,2' is not a number; write 0.2"),
        (["run", "--epochs", "2.5"], "'--epochs': '2.5' is not a whole number"),
        (["run", "--repeats", "0"], "'--repeats': '0': it should be greater than or equal to 1"),
        (["run", "--engine", "x"], "'--engine': 'x' is not one of 'torch', 'ray'"),
        (["evaluate", "run", "--crops", "five"], "'--crops': 'five' is not a whole number"),
    ],
)
def test_a_refused_value_is_shown(cli: Cli, words: list[object], said: str) -> None:
    result = cli(*words)
    assert result.exit_code == ExitCode.USAGE == 2
    shown = " ".join(result.stderr.replace("│", " ").split())
    assert said in shown


# --- names that no command can use -------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "series", "extract", "export", "check"])
def test_an_output_whose_name_is_not_utf8_is_refused_at_once(
    cli: Cli, run_words: list[object], image_folder: Path, tiny: Path, tmp_path: Path, command: str
) -> None:
    """safetensors opens no such file, so that the work of a run was lost at its end."""
    words: dict[str, list[object]] = {
        "run": run_words,
        "series": [*run_words, "--repeats", 2],
        "extract": ["extract", "-b", tiny, "-d", image_folder, "-l", "last"],
        "export": ["export", tmp_path / "model"],
        "check": ["check", image_folder],
    }
    output = tmp_path / "a\udcff"
    assert "holds bytes that are not UTF-8" in refused(cli, ExitCode.USAGE, *words[command], "-o", output)
    assert not os.path.lexists(output)


def test_a_model_is_not_exported_below_a_folder_whose_name_is_not_utf8(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a\udcff").mkdir()
    monkeypatch.chdir(tmp_path / "a\udcff")
    assert "not UTF-8" in refused(cli, ExitCode.USAGE, "export", "model", "-o", "new")


@pytest.mark.sample(4)
@pytest.mark.parametrize("path", ["x" * 120_000, "x/" * 50_000, "x" * 300])
@pytest.mark.parametrize("words", ["report P", "compare P .", "export P -o new", "check -o new --run P"])
def test_a_path_that_is_too_long_is_refused(cli: Cli, words: str, path: str) -> None:
    command = [path if word == "P" else word for word in words.split()]
    assert "longer than the file system allows" in refused(cli, ExitCode.USAGE, *command)
