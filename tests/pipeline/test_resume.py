"""A finished run, and a command that cannot resume it: nothing in its folder changes, not one byte."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from finetune.errors import ExitCode
from tests.conftest import Cli, FinishedRun, draw, draw_folder, make_tiny
from tests.sweeps import slow_except

Edit = Callable[[Path], object]


def digest(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def data(image_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(image_folder, tmp_path / "data")


@pytest.fixture
def words(tiny: Path, data: Path, tmp_path: Path) -> list[object]:
    """Two epochs of the upper stages; a later flag replaces an earlier one."""
    settings = ("-s", "top", "--epochs", 2, "--batch-size", 8, "--workers", 0, "--set", "cache=off")
    return ["run", "-b", tiny, "-d", data, "-o", tmp_path / "run", *settings]


@pytest.fixture
def finished(cli: Cli, words: list[object], tmp_path: Path) -> Path:
    result = cli(*words)
    assert result.exit_code == 0, result.output
    return tmp_path / "run"


# --- other classes -------------------------------------------------------------------------------


def rename(data: Path, old: str, new: str) -> None:
    for split in ("train", "val"):
        (data / split / old).rename(data / split / new)


def add_class(data: Path) -> None:
    for split in ("train", "val"):
        for number in range(6):
            draw(data / split / "violet" / f"{number}.jpg", (150, 40, 200), seed=number)


def swap(data: Path) -> None:
    rename(data, "red", "x")
    rename(data, "blue", "red")
    rename(data, "x", "blue")


OTHER_CLASSES: dict[str, tuple[Edit, str]] = {
    "renamed": (lambda data: rename(data, "red", "a_red"), "new: 'a_red'; gone: 'red'"),
    "order kept": (lambda data: rename(data, "red", "redd"), "new: 'redd'; gone: 'red'"),
    "added": (add_class, "new: 'violet'"),
    "removed": (
        lambda data: [shutil.rmtree(data / part / "red") for part in ("train", "val")],
        "gone: 'red'",
    ),
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("edit", slow_except(["renamed", "added"], OTHER_CLASSES))
def test_other_classes_never_resume_and_leave_a_finished_run_as_it_was(
    cli: Cli, words: list[object], finished: Path, data: Path, edit: str
) -> None:
    change, said = OTHER_CLASSES[edit]
    change(data)
    before = digest(finished)
    for more in ([], ["--allow-changed"], ["--epochs", 4, "--allow-changed"], ["--epochs", 4]):
        result = cli(*words, *more)
        assert result.exit_code == ExitCode.DATA == 65, result.output
        shown = " ".join(result.stderr.split())
        assert said in shown and "the run: blue, green, red" in shown and "the data: " in shown
        assert f"--backbone {finished} -o NEW" in shown
        assert digest(finished) == before


@pytest.mark.slow
def test_classes_in_another_order_are_named(
    cli: Cli, tiny: Path, finished_run: FinishedRun, tmp_path: Path, data: Path, words: list[object]
) -> None:
    assert cli(*words).exit_code == 0
    names = tmp_path / "run" / "classes.txt"
    names.write_text("red\ngreen\nblue\n")  # as where an earlier version sorted them in another way
    result = cli(*words, "--allow-changed", "--epochs", 3)
    assert result.exit_code == 65
    assert "the same names in another order" in result.stderr


# --- what is allowed, and cannot be --------------------------------------------------------------


def damage_images(data: Path) -> None:
    for path in (data / "train" / "red").iterdir():
        path.write_bytes(b"")


def leak(data: Path) -> None:
    shutil.copy(data / "train" / "red" / "000.jpg", data / "val" / "red" / "copy.jpg")


def damage_checkpoints(data: Path) -> None:
    for path in (data.parent / "run" / "checkpoints").rglob("state.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])


def lose_checkpoints(data: Path) -> None:
    shutil.rmtree(data.parent / "run" / "checkpoints")
    draw(data / "val" / "red" / "new.jpg", (200, 50, 40), seed=99)


def no_edit(_: Path) -> None:
    pass


REFUSED: dict[str, tuple[Edit, list[object], str]] = {
    "strategy, more": (no_edit, ["-s", "full"], "that would now be trained were not before"),
    "strategy, fewer": (no_edit, ["-s", "freeze"], "that were trained would not be now"),
    "solved": (no_edit, ["-s", "freeze", "--set", "strategy.features=last"], "it was trained for epochs"),
    "average": (no_edit, ["--set", "training.ema_decay=0.9"], "no moving average"),
    "unreadable": (damage_images, [], "cannot be read"),
    "leak": (leak, [], "copies"),
    "damaged": (damage_checkpoints, ["--epochs", 3], "none of its checkpoints can be used"),
    "lost": (lose_checkpoints, [], "the checkpoints of the finished run are missing"),
}


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "kind", slow_except(["strategy, fewer", "solved", "average", "leak", "lost"], REFUSED)
)
def test_a_refused_change_leaves_a_finished_run_as_it_was(
    cli: Cli, words: list[object], finished: Path, data: Path, kind: str
) -> None:
    edit, more, said = REFUSED[kind]
    edit(data)
    before = digest(finished)
    result = cli(*words, "--allow-changed", *more)
    assert result.exit_code == ExitCode.DATA == 65, result.output
    assert said in " ".join(result.stderr.split())
    assert digest(finished) == before
    assert json.loads((finished / "outcome.json").read_text())["state"] == "done"


def make_other(folder: Path) -> Path:
    """The same architecture, with other weights, under another name."""
    from safetensors.torch import save_file

    tensors = load_file(make_tiny(folder) / "model.safetensors")
    save_file(
        {k: v + 0.01 if v.is_floating_point() else v for k, v in tensors.items()},
        folder / "model.safetensors",
    )
    return folder


@pytest.mark.slow
def test_a_solved_run_refuses_another_backbone(cli: Cli, words: list[object], tmp_path: Path) -> None:
    solved = [*words, "-s", "freeze", "--set", "strategy.features=last"]
    assert cli(*solved).exit_code == 0
    before = digest(tmp_path / "run")
    result = cli(*solved, "--allow-changed", "-b", make_other(tmp_path / "other"))
    assert result.exit_code == 65, result.output
    assert "another backbone" in result.stderr
    assert digest(tmp_path / "run") == before


@pytest.mark.slow
def test_another_backbone_is_refused_even_where_its_shapes_fit(
    cli: Cli, words: list[object], finished: Path, tmp_path: Path
) -> None:
    other = make_other(tmp_path / "other")
    before = digest(finished)
    result = cli(*words, "--allow-changed", "--epochs", 4, "-b", other)
    assert result.exit_code == 65, result.output
    assert "another backbone" in result.stderr
    assert digest(finished) == before


@pytest.mark.slow
def test_a_moved_backbone_is_the_same(
    cli: Cli, words: list[object], finished: Path, tiny: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(tiny, tmp_path / "moved")
    result = cli(*words, "--allow-changed", "--epochs", 3, "-b", moved)
    assert result.exit_code == 0, result.output


# --- another optimizer ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("first", slow_except(["sgd"], ["sgd", "adamw"]))
def test_another_optimizer_starts_afresh_and_says_so(
    cli: Cli, words: list[object], tmp_path: Path, first: str
) -> None:
    second = {"sgd": "adamw", "adamw": "sgd"}[first]
    assert cli(*words, "--set", f"training.optimizer={first}").exit_code == 0
    more = ["--epochs", 4, "--lr", 0.001, "--set", f"training.optimizer={second}"]
    result = cli(*words, *more, "--allow-changed")
    assert result.exit_code == 0, result.output
    assert f"the state of another optimizer: {second} starts afresh" in " ".join(result.stderr.split())
    state = load_file(max((tmp_path / "run" / "checkpoints").glob("*/state.safetensors")))
    kept = {name.rpartition(":")[2] for name in state if name.startswith("optimizer.")}
    assert kept == ({"momentum_buffer"} if second == "sgd" else {"step", "exp_avg", "exp_avg_sq"})


@pytest.mark.slow
def test_a_strategy_from_random_weights_keeps_the_scale_that_the_head_was_trained_on(
    cli: Cli, words: list[object], tmp_path: Path
) -> None:
    """The mean and deviation of the features belong to the weights of the checkpoint."""
    assert cli(*words, "-s", "full").exit_code == 0
    before = json.loads((tmp_path / "run" / "metrics.json").read_text())["loss"]
    result = cli(*words, "-s", "scratch", "--allow-changed")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["loss"] == pytest.approx(
        before, rel=1e-3
    )


# --- no readable image ---------------------------------------------------------------------------

UNREADABLE: dict[str, bytes] = {
    "empty": b"",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "truncated": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01",
    "tiff": b"II*\x00\x08\x00\x00\x00\x00\x00",
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("content", UNREADABLE)
@pytest.mark.parametrize("layout", slow_except(["split"], ["split", "flat"]))
def test_data_without_one_readable_image_are_refused_with_the_list(
    cli: Cli, tiny: Path, tmp_path: Path, content: str, layout: str
) -> None:
    data = tmp_path / "data"
    parts = ("train", "val") if layout == "split" else ("",)
    for part in parts:
        draw_folder(data / part, {"red": 6, "blue": 6})
    for path in data.rglob("*.jpg"):
        path.write_bytes(UNREADABLE[content])
    result = cli("run", "-b", tiny, "-d", data, "-o", tmp_path / "run", "--workers", 0)
    assert result.exit_code == ExitCode.DATA == 65, result.output
    assert "cannot be read" in result.stderr and "000.jpg" in result.stderr
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["retryable"] is False
    checked = cli("check", data, "-o", tmp_path / "check")
    assert checked.exit_code == ExitCode.DATA, checked.output
    for command in ("extract", "probe"):
        result = cli(command, "-b", tiny, "-d", data, "-o", tmp_path / command)
        assert result.exit_code == ExitCode.DATA, (command, result.output)
