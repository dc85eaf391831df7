"""One run over a real Ray cluster of two nodes: the same metrics, whatever happens to its processes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import draw_folder
from tests.launch.ray.cluster import two_nodes

pytestmark = pytest.mark.ray
PATIENCE = 600
WITHOUT_BATCH_NORM = ("--backbone", "timm/test_vit", "--strategy", "scratch", "--img-size", 32)
EPOCHS = 60


@pytest.fixture(scope="module")
def cluster(own_cache: None) -> Iterator[Mapping[str, str]]:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[train]'")
    with two_nodes() as environment:
        yield environment


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("data"), {"red": 24, "blue": 24})


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that the others have to equal."""
    output = tmp_path_factory.mktemp("whole") / "run"
    result = finish(start(os.environ, *words_of(data, output)))
    assert result.code == 0, result.stderr
    return output


def words_of(data: Path, output: object, *words: object) -> list[object]:
    settings = ["--batch-size", 8, "--epochs", EPOCHS, "--workers", 1]
    return ["run", *WITHOUT_BATCH_NORM, "--data", data, "--output", output, *settings, *words]


class End:
    """How a command ended."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.stdout, self.stderr = process.communicate(timeout=PATIENCE)
        self.code = process.returncode


def start(
    environment: Mapping[str, str], *words: object, folder: Path | None = None
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "finetune", *map(str, words)],
        env={**environment, "FINETUNE_STALL_TIMEOUT": "300"},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


finish = End


def rank_process(rank: int, output: Path) -> int | None:
    """The process of one rank that works on a run folder."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            told = (folder / "environ").read_bytes().split(b"\0")
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"RANK={rank}".encode() in told and str(output).encode() in words and b"finetune" in words:
            return int(folder.name)
    return None


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def has_saved(output: Path) -> Callable[[], bool]:
    """Training is under way, and has a checkpoint to go on from."""
    return lambda: any((output / "checkpoints").glob("*"))


def outcome_of(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "outcome.json").read_text())
    return content


def read_rows(path: Path) -> Sequence[Mapping[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


def assert_same_metrics(one: Path, other: Path) -> None:
    for name, tolerance in (("predictions.csv", 1e-5), ("history.csv", 1e-4)):
        rows = read_rows(one / name)
        others = read_rows(other / name)
        assert len(rows) == len(others)
        for row, its in zip(rows, others, strict=True):
            for key in set(row) - {"seconds", "images_per_second", "data_wait_fraction"}:
                assert its[key] == row[key] or abs(float(its[key]) - float(row[key])) < tolerance, (name, key)


def test_two_nodes_train_as_one_process(cluster: Mapping[str, str], data: Path, whole: Path) -> None:
    """From a relative run folder; what the user sees is what one process says, once."""
    words = words_of(data, "here", "--engine", "ray", "--processes", 2, "--json")
    result = finish(start(cluster, *words, folder=data.parent))
    assert result.code == 0, result.stderr
    output = data.parent / "here"
    assert_same_metrics(whole, output)
    assert (
        json.loads(result.stdout)["accuracy"] == json.loads((whole / "metrics.json").read_text())["accuracy"]
    )
    assert json.loads((output / "environment.json").read_text())["processes"] == 2
    assert result.stderr.count("data ") == result.stderr.count("report ") == 1
    assert "pid=" not in result.stderr
    assert "WARNING" not in result.stderr


def test_frozen_features_are_the_same(cluster: Mapping[str, str], tmp_path: Path) -> None:
    words = ["run", "--data", "sample:digits", "--strategy", "freeze", "--epochs", 1, "--img-size", 32]
    one, two = tmp_path / "one", tmp_path / "two"
    assert finish(start(os.environ, *words, "--output", one)).code == 0
    result = finish(start(cluster, *words, "--output", two, "--engine", "ray", "--processes", 2))
    assert result.code == 0, result.stderr
    assert_same_metrics(one, two)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process(
    cluster: Mapping[str, str], data: Path, whole: Path, tmp_path: Path, rank: int
) -> None:
    """The same command goes on by itself, to the same result."""
    output = tmp_path / "run"
    command = start(cluster, *words_of(data, output, "--engine", "ray", "--processes", 2))
    wait_for(has_saved(output))
    os.kill(wait_for(lambda: rank_process(rank, output)), signal.SIGKILL)
    result = finish(command)
    assert result.code == 0, result.stderr
    assert result.stderr.count("starting again in") == 1
    assert (outcome_of(output)["state"], outcome_of(output)["attempt"]) == ("done", 2)
    assert_same_metrics(whole, output)


def test_a_killed_worker_of_ray(cluster: Mapping[str, str], data: Path, whole: Path, tmp_path: Path) -> None:
    """Its process ends with it, and no second one works on the run."""
    output = tmp_path / "run"
    command = start(cluster, *words_of(data, output, "--engine", "ray", "--processes", 2))
    wait_for(has_saved(output))
    process = wait_for(lambda: rank_process(0, output))
    worker = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{process}").exists())
    result = finish(command)
    assert result.code == 0, result.stderr
    assert "the run lost one of its processes; starting again in" in result.stderr
    assert_same_metrics(whole, output)


def test_sigterm_saves_and_leaves_with_75(
    cluster: Mapping[str, str], data: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    words = words_of(data, output, "--engine", "ray", "--processes", 2)
    command = start(cluster, *words)
    wait_for(has_saved(output))
    command.send_signal(signal.SIGTERM)
    result = finish(command)
    assert result.code == 75, result.stderr
    assert ", to resume." in result.stderr
    assert (outcome_of(output)["state"], outcome_of(output)["exit_code"]) == ("interrupted", 75)
    assert not rank_process(0, output) and not rank_process(1, output)
    assert finish(start(cluster, *words)).code == 0
    assert_same_metrics(whole, output)


def test_nothing_is_left_of_a_killed_command(
    cluster: Mapping[str, str], data: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    words = words_of(data, output, "--engine", "ray", "--processes", 2)
    command = start(cluster, *words)
    wait_for(has_saved(output))
    command.kill()
    wait_for(lambda: rank_process(0, output) is None and rank_process(1, output) is None)
    command.communicate()
    assert finish(start(cluster, *words)).code == 0
    assert_same_metrics(whole, output)


def test_a_refusal_keeps_its_exit_code(cluster: Mapping[str, str], tmp_path: Path) -> None:
    words = ["run", "--data", tmp_path / "absent", "--strategy", "freeze", "--output", tmp_path / "run"]
    result = finish(start(cluster, *words, "--engine", "ray", "--processes", 2, "--json"))
    assert result.code == 65, result.stderr
    assert result.stderr.count("does not exist") == 1
    assert json.loads(result.stdout)["exit_code"] == 65


def test_a_cluster_of_two_processors_has_no_third(cluster: Mapping[str, str], data: Path) -> None:
    result = finish(start(cluster, *words_of(data, "x", "--engine", "ray", "--processes", 3)))
    assert result.code == 78
    assert "the Ray cluster has 2 CPUs" in result.stderr
