"""Pipes, devices, sockets and folders in the place of a file that the user or a folder names.

Each is refused at once with a documented exit code: opening a pipe would wait for its other end for ever, and
reading ``/dev/zero`` would fill the memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import ExitCode
from tests.conftest import Cli, draw
from tests.damage import KINDS
from tests.sweeps import slow_except

pytestmark = pytest.mark.usefixtures("never_waits")


@dataclass(frozen=True)
class Folders:
    """What the commands are given: a folder of class folders, one of a network, and room for output."""

    root: Path
    images: Path
    network: Path

    @property
    def image(self) -> Path:
        return self.images / "a" / "0.png"

    @property
    def run(self) -> list[Any]:
        words = ["--epochs", 1, "--workers", 0, "-o", self.root / "out"]
        return ["run", "-b", self.network, "-d", self.images, *words]


@pytest.fixture
def folders(tmp_path: Path, tiny: Path) -> Folders:
    for name in "ab":
        for number in range(2):
            draw(tmp_path / "images" / name / f"{number}.png", (9, 9, 9), number)
    return Folders(tmp_path, tmp_path / "images", shutil.copytree(tiny, tmp_path / "network"))


def beside(folders: Folders, name: str) -> Path:
    """A path beside a folder of images without class folders."""
    shutil.rmtree(folders.images / "a")
    shutil.move(folders.images / "b", folders.root / "b")
    shutil.move(folders.root / "b", folders.images / "images")
    return folders.images / name


def in_splits(folders: Folders, name: str) -> Path:
    """A path in a split folder without class folders, beside one that is sound."""
    for split, images in (("train", "a"), ("valid", "b")):
        shutil.move(folders.images / images, folders.images / split)
    (folders.images / "valid" / name).write_text("filename, x, y\n0.png, 1, 0\n1.png, 0, 1\n")
    return folders.images / "train" / name


def lists_of_cub(folders: Folders, name: str) -> Path:
    beside(folders, "images.txt").write_text("1 0.png\n2 1.png\n")
    (folders.images / "image_class_labels.txt").write_text("1 1\n2 2\n")
    (folders.images / name).unlink(missing_ok=True)
    return folders.images / name


Place = tuple[Callable[[Folders], Path], Callable[[Folders, Path], list[Any]], ExitCode]
"""The path that is taken by something else, the command, and its exit code."""


def named(name: str) -> Callable[[Folders], Path]:
    return lambda folders: folders.root / name


def check(_: Folders, path: Path) -> list[Any]:
    return ["check", path, "-o", path.with_name("found")]


def check_images(folders: Folders, _: Path) -> list[Any]:
    return ["check", folders.images, "-o", folders.root / "found"]


PLACES: dict[str, Place] = {
    "check table": (named("x.csv"), check, ExitCode.DATA),
    "check zip": (named("x.zip"), check, ExitCode.DATA),
    "check tar": (named("x.tar.gz"), check, ExitCode.DATA),
    "check image": (lambda at: at.images / "a" / "0.png", check_images, ExitCode.DATA),
    "check table beside": (lambda at: beside(at, "labels.csv"), check_images, ExitCode.DATA),
    "check one-hot": (lambda at: in_splits(at, "_classes.csv"), check_images, ExitCode.DATA),
    "check list": (lambda at: lists_of_cub(at, "image_class_labels.txt"), check_images, ExitCode.DATA),
    "check classes": (lambda at: lists_of_cub(at, "classes.txt"), check_images, ExitCode.DATA),
    "check packed split": (lambda at: beside(at, "train.zip"), check_images, ExitCode.DATA),
    "predict table": (
        named("x.tsv"),
        lambda at, path: ["predict", at.network, path, "-o", at.root / "out.csv"],
        ExitCode.DATA,
    ),
    "predict image": (
        named("x.png"),
        lambda at, path: ["predict", at.network, path, "-o", at.root / "out.csv"],
        ExitCode.DATA,
    ),
    "predict model": (
        lambda at: at.network / "model.safetensors",
        lambda at, _: ["predict", at.network, at.image, "-o", at.root / "out.csv"],
        ExitCode.USAGE,
    ),
    "evaluate table": (
        named("x.csv"),
        lambda at, path: ["evaluate", at.network, "-d", path, "-o", at.root / "out"],
        ExitCode.DATA,
    ),
    "run recipe": (named("x.yaml"), lambda at, path: [*at.run, "--recipe", path], ExitCode.USAGE),
    "run table": (named("x.csv"), lambda at, path: [*at.run, "-d", path], ExitCode.DATA),
    "run weights": (named("x.pth"), lambda at, path: [*at.run, "--weights", path], ExitCode.USAGE),
    "run backbone": (named("x"), lambda at, path: [*at.run, "-b", f"local-dir:{path}"], ExitCode.USAGE),
    "run config": (lambda at: at.network / "config.json", lambda at, _: at.run, ExitCode.USAGE),
    "similar query": (
        named("x.png"),
        lambda at, path: ["similar", path, "-b", at.network, "-d", at.images, "-o", at.root / "out"],
        ExitCode.DATA,
    ),
    "report run": (named("x"), lambda _, path: ["report", path], ExitCode.USAGE),
    "compare run": (named("x"), lambda at, path: ["compare", path, at.network], ExitCode.USAGE),
    "check run": (
        named("x"),
        lambda at, path: ["check", "--run", path, "-o", at.root / "out"],
        ExitCode.USAGE,
    ),
    "export model": (named("x"), lambda at, path: ["export", path, "-o", at.root / "out"], ExitCode.USAGE),
}

CASES = [(place, kind) for place in PLACES for kind in KINDS if kind != "nowhere"]
QUICK = [(place, "pipe") for place in PLACES] + [("predict table", "device"), ("check list", "device")]


@pytest.mark.sample(3)
@pytest.mark.parametrize("case", slow_except(QUICK, CASES), ids=" ".join)
def test_what_is_no_file_is_refused_at_once(cli: Cli, folders: Folders, case: tuple[str, str]) -> None:
    place, kind = case
    find, command, code = PLACES[place]
    path = find(folders)
    path.unlink(missing_ok=True)
    KINDS[kind](path)
    result = cli(*command(folders, path))
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["check table", "predict table", "evaluate table", "run table"])
def test_no_command_reads_a_table_of_three_gigabytes(cli: Cli, folders: Folders, command: str) -> None:
    find, words, code = PLACES[command]
    path = find(folders)
    with path.open("wb") as file:
        file.truncate(3 * 2**30)  # takes no room on the disk
    result = cli(*words(folders, path))
    assert result.exit_code == code
    assert "has 3072 MB, more than 1024 MB" in result.output
