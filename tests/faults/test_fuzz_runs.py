"""Whatever a file of a run folder holds, each command that reads it ends with a documented exit code."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from finetune.errors import ExitCode
from tests.conftest import QUICK_RUN, Cli, FinishedRun
from tests.damage import CONTENTS, KINDS, csv_variants, json_variants
from tests.sweeps import slow_except

pytestmark = pytest.mark.usefixtures("never_waits")

EXPECTED = {ExitCode.DONE, ExitCode.USAGE, ExitCode.DATA, ExitCode.DISK, ExitCode.ENVIRONMENT}
"""Every documented exit code but those of a bug, of an interruption and of a training that diverges."""


@dataclass(frozen=True)
class Damaged:
    """A copy of a finished run, one file of which is damaged; a sound one; and a path for output."""

    run: Path
    sound: Path
    images: Path
    network: Path
    output: Path

    def train(self, epochs: int, output: Path, backbone: Path | None = None) -> list[Any]:
        words = ["run", "-b", backbone or self.network, "-d", self.images, "-s", "freeze", *QUICK_RUN]
        return [*words, "--epochs", epochs, "-o", output]


COMMANDS: dict[str, Callable[[Damaged], list[Any]]] = {
    "report": lambda at: ["report", at.run],
    "compare": lambda at: ["compare", at.sound, at.run],
    "evaluate": lambda at: ["evaluate", at.run, "-o", at.output],
    "export": lambda at: ["export", at.run, "-o", at.output],
    "check": lambda at: ["check", "--run", at.run, "-o", at.output],
    "predict": lambda at: ["predict", at.run, at.images / "val/red/000.jpg", "-o", f"{at.output}.csv"],
    "extract": lambda at: ["extract", "-b", at.network, "-d", at.run, "-l", "last", "-o", at.output],
    "again": lambda at: at.train(5, at.run),
    "longer": lambda at: at.train(6, at.run),
    "start from": lambda at: at.train(1, at.output, at.run),
}
CHECKPOINT = "checkpoints/checkpoint-000002"
READERS: dict[str, tuple[str, ...]] = {
    "recipe.yaml": ("report", "evaluate", "check", "extract", "again"),
    "outcome.json": ("report", "compare", "export", "again", "longer"),
    "metrics.json": ("report", "compare", "evaluate", "export", "again"),
    "split.csv": ("report", "compare", "evaluate", "export", "check", "extract", "again", "start from"),
    "predictions.csv": ("report", "compare", "export"),
    "classes.txt": ("report", "again"),
    "confusion_matrix.csv": ("report",),
    "per_class.csv": ("report",),
    "history.csv": ("report", "longer"),
    "plan.csv": ("report", "compare"),
    "check.json": ("report", "again"),
    "environment.json": ("report", "longer"),
    "trunk.json": ("longer",),
    "run.log": ("longer",),
    "model/config.json": ("report", "evaluate", "export", "predict", "start from"),
    "model/model.safetensors": ("report", "export", "predict", "start from"),
    f"{CHECKPOINT}/manifest.json": ("longer",),
    f"{CHECKPOINT}/state.safetensors": ("longer",),
    f"{CHECKPOINT}/best.safetensors": ("longer",),
}
"""The commands that read each file of a run."""

CASES = [
    (file, damage, command)
    for file, commands in READERS.items()
    for command in commands
    for damage in (*KINDS, *CONTENTS)
]
QUICK = [
    ("metrics.json", "pipe", "report"),
    ("predictions.csv", "pipe", "compare"),
    ("model/model.safetensors", "pipe", "report"),
    ("model/config.json", "device", "predict"),
    (f"{CHECKPOINT}/manifest.json", "pipe", "longer"),
    ("run.log", "pipe", "longer"),
    ("confusion_matrix.csv", "half", "report"),
    ("plan.csv", "twice", "report"),
    ("outcome.json", "deep list", "compare"),
    ("split.csv", "half", "evaluate"),
    ("recipe.yaml", "digits", "again"),
]


@pytest.fixture
def damaged(finished_run: FinishedRun, image_folder: Path, tiny: Path, tmp_path: Path) -> Damaged:
    return Damaged(tmp_path / "run", finished_run("freeze"), image_folder, tiny, tmp_path / "out")


def end_of(cli: Cli, damaged: Damaged, command: str, file: str, damage: bytes | str) -> str:
    """What is wrong with the end of a command on a run with a damaged file; "" for nothing."""
    for path in (damaged.run, damaged.output):
        shutil.rmtree(path, ignore_errors=True)
    damaged.output.with_name("out.csv").unlink(missing_ok=True)
    leave_out = () if command in ("again", "longer") else ("checkpoints",)
    shutil.copytree(damaged.sound, damaged.run, ignore=shutil.ignore_patterns(*leave_out))
    path = damaged.run / file
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    else:
        path.unlink()
        KINDS[damage](path)
    signal.alarm(30)  # of never_waits, for each of many commands
    result = cli(*COMMANDS[command](damaged))
    if result.exit_code in EXPECTED and "Traceback" not in result.output:
        return ""
    return f"exit code {result.exit_code}: {result.output[-500:]}"


@pytest.mark.sample(2)
@pytest.mark.parametrize("case", slow_except(QUICK, CASES), ids=", ".join)
def test_a_damaged_file_ends_no_command_by_surprise(
    cli: Cli, damaged: Damaged, case: tuple[str, str, str]
) -> None:
    file, name, command = case
    content = (damaged.sound / file).read_bytes()
    damage = name if name in KINDS else CONTENTS[name](content)
    assert end_of(cli, damaged, command, file, damage) == ""


MOST_VARIANTS = 150
"""Of each file and command, the same ones every time. All of them take an hour: each is a whole command."""


def some_of(variants: Iterator[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """Return variants drawn by their names, so that a new one changes none of the others."""
    return sorted(variants, key=lambda variant: crc32(variant[0].encode()))[:MOST_VARIANTS]


TABLES = [(file, command) for file in READERS if file.endswith(".csv") for command in ("report", "compare")]
OBJECTS = [
    *((file, command) for file in READERS for command in ("report", "compare") if file.endswith("s.json")),
    ("outcome.json", "compare"),
    ("check.json", "report"),
    ("environment.json", "report"),
    ("model/config.json", "predict"),
    (f"{CHECKPOINT}/manifest.json", "longer"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "command"), [case for case in TABLES if case[1] in READERS[case[0]]])
def test_no_cell_of_a_table_ends_a_command_by_surprise(
    cli: Cli, damaged: Damaged, file: str, command: str
) -> None:
    variants = some_of(csv_variants((damaged.sound / file).read_bytes()))
    ends = {name: end_of(cli, damaged, command, file, content) for name, content in variants}
    assert {name: end for name, end in ends.items() if end} == {}


@pytest.mark.slow
@pytest.mark.parametrize(("file", "command"), [case for case in OBJECTS if case[1] in READERS[case[0]]])
def test_no_value_of_an_object_ends_a_command_by_surprise(
    cli: Cli, damaged: Damaged, file: str, command: str
) -> None:
    variants = some_of(json_variants((damaged.sound / file).read_bytes()))
    ends = {name: end_of(cli, damaged, command, file, content) for name, content in variants}
    assert {name: end for name, end in ends.items() if end} == {}
