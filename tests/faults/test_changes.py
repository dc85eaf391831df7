"""A run folder, and a command that is not quite the one it was begun with: nothing, more, or a refusal."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from finetune.errors import ExitCode
from finetune.training.checkpoint import CheckpointStore
from finetune.training.trainer import Trainer
from tests.conftest import COLOURS, Cli, draw, draw_folder
from tests.sweeps import slow_except

BITS = ("model/model.safetensors", "predictions.csv")


@pytest.fixture
def data(image_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(image_folder, tmp_path / "data")


@pytest.fixture
def weights(tiny: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny, tmp_path / "tiny")


@pytest.fixture
def words(weights: Path, data: Path, tmp_path: Path) -> Callable[..., list[object]]:
    """``words("b", epochs=4)`` is a command with its output in ``b``."""

    def build(output: str = "run", *more: object, epochs: int = 2, batch_size: int = 8) -> list[object]:
        settings = (
            "--epochs",
            epochs,
            "--batch-size",
            batch_size,
            "--workers",
            0,
            "-s",
            "full",
            "--set",
            "cache=off",
        )
        return ["run", "-b", weights, "-d", data, "-o", tmp_path / output, *settings, *more]

    return build


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def act_in_epoch(monkeypatch: pytest.MonkeyPatch, epoch: int, action: Callable[[], object]) -> None:
    """Act after the first step of an epoch (from 1)."""
    step = Trainer._train_step

    def step_and_act(self: Trainer, *arguments: Any) -> bool:
        made = step(self, *arguments)
        if (self.progress.epoch, self.progress.batch) == (epoch - 1, 1):
            action()
        return made

    monkeypatch.setattr(Trainer, "_train_step", step_and_act)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt(cli: Cli, monkeypatch: pytest.MonkeyPatch, words: list[object], epoch: int = 2) -> None:
    with monkeypatch.context() as patch:
        act_in_epoch(patch, epoch, stop)
        assert cli(*words).exit_code == ExitCode.INTERRUPTED


def assert_same_result(one: Path, two: Path) -> None:
    for name in BITS:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


Words = Callable[..., list[object]]

# --- the same command again ----------------------------------------------------------------------


@pytest.mark.slow
def test_a_finished_run_does_nothing_and_writes_nothing(cli: Cli, words: Words, tmp_path: Path) -> None:
    first = cli(*words(), "--json")
    before = snapshot(tmp_path / "run")
    again = cli(*words(), "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout) == json.loads(first.stdout)
    assert "already holds this run" in again.stderr
    assert snapshot(tmp_path / "run") == before


@pytest.mark.slow
def test_deleted_checkpoints_of_an_interrupted_run_are_told_of(
    cli: Cli, words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(cli, monkeypatch, words())
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    result = cli(*words())
    assert result.exit_code == 0, result.output
    assert "training starts from the beginning" in result.stderr
    assert cli(*words("straight")).exit_code == 0
    assert_same_result(tmp_path / "run", tmp_path / "straight")


def test_damaged_checkpoints_are_never_started_over_in_silence(
    cli: Cli, words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(cli, monkeypatch, words())
    for file in (tmp_path / "run" / "checkpoints").rglob("state.safetensors"):
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
    result = cli(*words())
    assert result.exit_code == ExitCode.DATA == 65
    assert "none of its checkpoints can be used" in result.stderr and "sha256" in result.stderr


# --- more or fewer epochs ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("schedule", slow_except(["plateau"], ["constant", "step", "plateau"]))
def test_more_epochs_give_the_bits_of_a_longer_run(
    cli: Cli, words: Words, tmp_path: Path, schedule: str
) -> None:
    how = ("--set", f"training.schedule={schedule}", "--set", "training.decay_epochs=1")
    for output, epochs in (("longer", 2), ("longer", 4), ("straight", 4)):
        result = cli(*words(output, *how, epochs=epochs))
        assert result.exit_code == 0, result.output
    assert_same_result(tmp_path / "longer", tmp_path / "straight")


@pytest.mark.slow
def test_more_epochs_of_a_cosine_go_on(cli: Cli, words: Words, tmp_path: Path) -> None:
    assert cli(*words()).exit_code == 0
    assert cli(*words(epochs=3)).exit_code == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["epochs"] == 3
    assert len(pd.read_csv(tmp_path / "run" / "history.csv")) == 3


@pytest.mark.slow
def test_a_finished_run_without_checkpoints_is_not_made_longer(
    cli: Cli, words: Words, tmp_path: Path
) -> None:
    """To train again from the start and replace the model is nothing that was asked for."""
    assert cli(*words()).exit_code == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = snapshot(tmp_path / "run")
    for _ in range(2):  # a refusal must not be what lets the second try through
        result = cli(*words(epochs=3))
        assert result.exit_code == ExitCode.DATA
        assert "the checkpoints of the finished run are missing" in result.stderr
        assert snapshot(tmp_path / "run") == before
    assert cli(*words()).exit_code == 0


# --- what is refused -----------------------------------------------------------------------------


def edit_image(data: Path) -> None:
    draw(data / "train" / "red" / "000.jpg", COLOURS["red"], seed=99)


def add_image(data: Path) -> None:
    draw(data / "val" / "red" / "new.jpg", COLOURS["red"], seed=99)


def remove_image(data: Path) -> None:
    (data / "train" / "red" / "000.jpg").unlink()


def move_image(data: Path) -> None:
    (data / "train" / "red" / "000.jpg").rename(data / "train" / "blue" / "moved.jpg")


def change_weights(data: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = data.parent / "tiny" / "model.safetensors"
    tensors = load_file(file)
    tensors["conv1.0.weight"] = tensors["conv1.0.weight"] + 1
    save_file(tensors, file)


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "edited": (edit_image, "1 with another content, train/red/000.jpg for one"),
    "added": (add_image, "1 new, val/red/new.jpg for one"),
    "removed": (remove_image, "1 gone, train/red/000.jpg for one"),
    "moved": (move_image, "1 new, train/blue/moved.jpg for one, 1 gone, train/red/000.jpg for one"),
    "weights": (change_weights, "weights: the content of the file changed"),
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("epochs", slow_except([2], [2, 3]))
@pytest.mark.parametrize("change", slow_except(["edited", "weights"], CHANGES))
def test_a_finished_run_with_other_inputs_is_refused_by_name(
    cli: Cli, words: Words, data: Path, tmp_path: Path, change: str, epochs: int
) -> None:
    make, said = CHANGES[change]
    assert cli(*words()).exit_code == 0
    make(data)
    before = snapshot(tmp_path / "run")
    result = cli(*words(epochs=epochs))
    assert result.exit_code == ExitCode.DATA == 65
    assert said in result.stderr and "--allow-changed" in result.stderr
    assert snapshot(tmp_path / "run") == before


@pytest.mark.parametrize("change", slow_except(["moved"], CHANGES))
def test_an_interrupted_run_with_other_inputs_is_refused_by_name(
    cli: Cli, words: Words, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    make, said = CHANGES[change]
    interrupt(cli, monkeypatch, words())
    make(data)
    before = snapshot(tmp_path / "run")
    result = cli(*words())
    assert result.exit_code == ExitCode.DATA == 65
    assert said in result.stderr
    assert snapshot(tmp_path / "run") == before


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"epochs": 1}, "training.epochs: 2 -> 1"),
        ({"batch_size": 4}, "training.batch_size: 8 -> 4"),
    ],
)
@pytest.mark.parametrize("finished", slow_except([False], [True, False]))
def test_another_recipe_is_refused_by_name(
    cli: Cli,
    words: Words,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, Any],
    said: str,
    finished: bool,
) -> None:
    if finished:
        assert cli(*words()).exit_code == 0
    else:
        interrupt(cli, monkeypatch, words())
    before = snapshot(tmp_path / "run")
    result = cli(*words(**changed))
    assert result.exit_code == ExitCode.USAGE == 2
    assert said in result.stderr
    assert snapshot(tmp_path / "run") == before


# --- what is allowed -----------------------------------------------------------------------------


@pytest.mark.slow
def test_other_images_may_be_allowed_and_are_told_of(
    cli: Cli, words: Words, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(cli, monkeypatch, words())
    remove_image(data)
    result = cli(*words(), "--allow-changed")
    assert result.exit_code == 0, result.output
    warning = "1 gone, train/red/000.jpg for one); the run resumes, because of --allow-changed"
    assert result.stderr.count(warning) == 1
    assert "train/red/000.jpg" not in (tmp_path / "run" / "split.csv").read_text()
    assert cli(*words()).exit_code == 0  # these are its images from now on


@pytest.mark.slow
@pytest.mark.parametrize(
    "died", slow_except([None], [None, "trainer.Trainer.fit", "checkpoint.CheckpointStore.save"])
)
def test_another_batch_size_begins_the_epoch_again_and_counts_its_steps(
    cli: Cli, words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, died: str | None
) -> None:
    """Also where the process that was allowed to is killed before it has written a checkpoint of its own."""
    interrupt(cli, monkeypatch, words())  # in epoch 2, after 5 + 1 steps of 8 images
    if died:
        with monkeypatch.context() as patch:
            patch.setattr(f"finetune.training.{died}", lambda *_: (_ for _ in ()).throw(ZeroDivisionError))
            assert cli(*words(batch_size=4), "--allow-changed").exit_code == ExitCode.INTERNAL
    result = cli(*words(batch_size=4), *([] if died else ["--allow-changed"]))
    assert result.exit_code == 0, result.output
    checkpoint = CheckpointStore(tmp_path / "run" / "checkpoints").load()
    assert checkpoint is not None
    assert checkpoint.now.progress.step == 2 * 9  # 36 images
    assert len(checkpoint.now.progress.history) == 2


@pytest.mark.slow
def test_other_versions_are_told_of(
    cli: Cli, words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(cli, monkeypatch, words())
    file = tmp_path / "run" / "environment.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"timm": "0.9.0", "cores": 999}))
    result = cli(*words())
    assert result.exit_code == 0, result.output
    assert "warning: resuming with other versions or hardware (timm 0.9.0 -> " in result.stderr
    assert "cores" not in result.stderr


# --- images that vanish while training goes on ---------------------------------------------------


@pytest.fixture
def many(data: Path) -> Path:
    """120 training images, of which one may vanish, and two may not."""
    return draw_folder(data / "train", dict.fromkeys(COLOURS, 40)).parent


def lose(data: Path, *names: str) -> Callable[[], None]:
    return lambda: [(data / name).unlink(missing_ok=True) for name in names] and None


@pytest.mark.slow
def test_few_lost_images_are_left_out_and_told_of(
    cli: Cli, words: Words, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    act_in_epoch(monkeypatch, 1, lose(many, "train/red/039.jpg"))
    result = cli(*words(epochs=4))
    assert result.exit_code == 0, result.output
    said = "warning: train/red/039.jpg can no longer be read (file not found); training continues without it"
    assert result.stderr.count(said) == 1
    listed = (tmp_path / "run" / "bad_images.csv").read_text()
    assert listed == "path,split,reason\ntrain/red/039.jpg,train,file not found\n"
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["lost_images"] == 1


@pytest.mark.slow
def test_a_run_that_lost_an_image_may_be_interrupted_and_made_longer(
    cli: Cli, words: Words, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as in one go, and the run does not refuse what it accepted before."""
    kept = (many / "train/red/039.jpg").read_bytes()
    how = ("--set", "training.schedule=constant")
    with monkeypatch.context() as patch:
        act_in_epoch(patch, 1, lose(many, "train/red/039.jpg"))
        assert cli(*words("straight", *how, epochs=4)).exit_code == 0
    (many / "train/red/039.jpg").write_bytes(kept)
    with monkeypatch.context() as patch:
        act_in_epoch(patch, 1, lose(many, "train/red/039.jpg"))
        interrupt(cli, monkeypatch, words("parts", *how, epochs=3))
    for epochs in (3, 3, 4):
        result = cli(*words("parts", *how, epochs=epochs))
        assert result.exit_code == 0, result.output
    assert_same_result(tmp_path / "straight", tmp_path / "parts")
    one, two = ((tmp_path / name / "bad_images.csv").read_text() for name in ("straight", "parts"))
    assert one == two


@pytest.mark.slow
def test_a_lost_image_does_not_change_which_images_were_drawn_for_validation(
    cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fifth of 103 images is 21, and a fifth of 102 would be 20."""
    flat = draw_folder(tmp_path / "flat", {"red": 103, "blue": 60})
    words = ["run", "-b", tiny, "-d", flat, "-o", tmp_path / "run", "-s", "freeze", "--epochs", 2]
    words += ["--workers", 0, "--batch-size", 32, "--set", "input.augmentation=none", "--set", "cache=off"]
    with monkeypatch.context() as patch:
        split = tmp_path / "run" / "split.csv"

        def lose_one() -> None:
            rows = pd.read_csv(split)
            (flat / rows[(rows.label == "red") & (rows["split"] == "train")].path.iloc[0]).unlink()

        act_in_epoch(patch, 1, lose_one)
        interrupt(cli, monkeypatch, words)
    drawn = split.read_text()
    result = cli(*words)
    assert result.exit_code == 0, result.output
    assert split.read_text() == drawn


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 8])
def test_many_lost_images_end_the_run(
    cli: Cli,
    words: Words,
    many: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
) -> None:
    names = ("train/red/038.jpg", "train/red/039.jpg")
    act_in_epoch(monkeypatch, 1, lose(many, *names))
    result = cli(*words(epochs=3, batch_size=batch_size), "-s", "freeze")
    assert result.exit_code == ExitCode.DATA == 65
    assert "2 of 120 training images cannot be read any more" in result.stderr
    listed = (tmp_path / "run" / "bad_images.csv").read_text()
    assert all(name in result.stderr and name in listed for name in names)


@pytest.mark.slow
def test_a_batch_that_lost_all_its_images_is_no_step_of_learning(
    cli: Cli, words: Words, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    act_in_epoch(monkeypatch, 1, lose(many, "train/red/039.jpg"))
    result = cli(*words(batch_size=1), "-s", "freeze")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["lost_images"] == 1


def test_a_lost_validation_image_ends_the_run_by_name(
    cli: Cli, words: Words, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    act_in_epoch(monkeypatch, 1, lose(data, "val/red/003.jpg"))
    result = cli(*words())
    assert result.exit_code == ExitCode.DATA == 65
    assert "val/red/003.jpg (file not found)" in result.stderr
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["class"] == "data"
