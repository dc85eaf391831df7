"""Trackers get every epoch once and cannot harm a run. Each test uses the real client and reads its files."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from finetune.errors import EnvironmentFaultError, ExitCode
from finetune.pipeline.run import run as run_job
from finetune.recipe import load_recipe
from finetune.runs.folder import RunFolder
from finetune.tracking import trackers as trackers_module
from finetune.tracking.tracker import EPOCH_METRICS, describe_run, flatten_metrics
from finetune.tracking.trackers import CLIENTS, Trackers, check_trackers
from tests.conftest import Cli
from tests.faults.test_two_writers import after_epoch
from tests.tracking.readers import Series, read_mlflow, read_tensorboard, read_wandb
from tests.training.helpers import Listener

ALL = ("tensorboard", "wandb", "mlflow")
ROW = {"epoch": 1, "train_loss": 1.0, "eval_loss": 0.5, "eval_accuracy": 0.25, "lr": 0.1, "seconds": 1.0}
ROW |= {"images_per_second": 7.0, "data_wait_fraction": 0.0}


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the machine's own settings of the trackers, so that all files stay in the test's folder."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)
    for client in CLIENTS.values():  # imported again, since the import sets variables
        sys.modules.pop(client.rpartition(".")[0], None)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="session")
def needs_wandb() -> None:
    """Skip where wandb-core, the program that the client starts, cannot run."""
    from wandb.util import get_core_path

    found = subprocess.run([get_core_path(), "--help"], capture_output=True, check=False)
    if found.returncode:
        pytest.skip(f"wandb-core does not run here: {found.stderr.decode()[:200]}")


def words_of(tiny: Path, data: Path, output: Path, epochs: int = 3, to: tuple[str, ...] = ALL) -> list[Any]:
    quick = ["--epochs", epochs, "--batch-size", 8, "--workers", 0, "--set", "strategy.dropout=0.3"]
    tracking = ["--set", f"tracking.to=[{', '.join(to)}]"] if to else []
    return ["run", "-b", tiny, "-d", data, "-o", output, "-s", "full", *quick, *tracking]


def read_all(output: Path) -> Iterator[tuple[str, Series]]:
    home = output / "tracking"
    yield "tensorboard", read_tensorboard(home / "tensorboard")[0]
    yield "wandb", read_wandb(home)[0]
    yield "mlflow", read_mlflow((home / "mlflow").as_uri())[0]


def assert_every_epoch_once(output: Path, epochs: int) -> None:
    history = pd.read_csv(output / "history.csv")
    for name, series in read_all(output):
        for metric in EPOCH_METRICS:
            assert sorted(series[metric]) == list(range(1, epochs + 1)), (name, metric)
            for epoch, value in zip(history.epoch, history[metric], strict=True):
                assert series[metric][epoch] == [pytest.approx(value, rel=1e-6)], (name, metric, epoch)


@pytest.mark.slow
@pytest.mark.usefixtures("needs_wandb")
def test_all_trackers_get_everything_and_no_bit_of_the_run_changes(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_TOKEN", "tiny-secret-0815")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with_all, without = tmp_path / "with-tiny-secret-0815", tmp_path / "without"
    result = cli(*words_of(tiny, image_folder, with_all), "--json")
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stderr
    metrics = json.loads(result.stdout)  # stdout holds nothing else
    assert cli(*words_of(tiny, image_folder, without, to=())).exit_code == 0
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    for name in ("model/model.safetensors", "predictions.csv"):
        assert (with_all / name).read_bytes() == (without / name).read_bytes()
    assert not (without / "tracking").exists()

    assert_every_epoch_once(with_all, 3)
    home = with_all / "tracking"
    scalars, texts = read_tensorboard(home / "tensorboard")
    assert scalars["final/accuracy"] == {3: [pytest.approx(metrics["accuracy"])]}
    assert "    epochs: 3\n" in texts["recipe"].replace("      epochs", "    epochs")
    series, run = read_mlflow((home / "mlflow").as_uri())
    assert series["final/seconds.total"] == {3: [metrics["seconds"]["total"]]}
    assert run.data.params["training.epochs"] == "3" and run.data.params["strategy.dropout"] == "0.3"
    assert run.info.status == "FINISHED" and run.info.run_name == "with-***"
    _, (recorded,), summary, text = read_wandb(home)
    config = {item.key: json.loads(item.value_json) for item in recorded.config.update}
    assert config["training.epochs"] == 3 and config["strategy.dropout"] == 0.3
    assert summary["final/accuracy"] == metrics["accuracy"] and summary["final/epochs"] == 3
    assert recorded.display_name == "with-***"
    everything = text + str(texts) + str(run.data.to_dictionary())
    assert socket.gethostname() not in everything.replace(str(tmp_path), "")
    assert "tiny-secret" not in everything and "***" in everything


@pytest.mark.slow
@pytest.mark.usefixtures("needs_wandb")
def test_a_resumed_run_is_the_same_run_and_logs_each_epoch_once(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        after_epoch(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert cli(*words_of(tiny, image_folder, output)).exit_code == ExitCode.INTERRUPTED
    _, run = read_mlflow((output / "tracking" / "mlflow").as_uri())
    assert run.info.status == "KILLED"
    time.sleep(1.1)  # wandb names the folder of an attempt by the second
    assert cli(*words_of(tiny, image_folder, output)).exit_code == 0
    assert_every_epoch_once(output, 3)
    assert len({run.run_id for run in read_wandb(output / "tracking")[1]}) == 1
    assert read_mlflow((output / "tracking" / "mlflow").as_uri())[1].info.status == "FINISHED"


@pytest.mark.slow
def test_a_tracker_that_is_added_later_gets_earlier_epochs(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    """Trackers are not part of a run's identity: a finished run is extended with one here."""
    output = tmp_path / "run"
    assert cli(*words_of(tiny, image_folder, output, epochs=1, to=())).exit_code == 0
    result = cli(*words_of(tiny, image_folder, output, epochs=2, to=("tensorboard",)))
    assert result.exit_code == 0, result.output
    scalars, _ = read_tensorboard(output / "tracking" / "tensorboard")
    assert {step: len(values) for step, values in scalars["train_loss"].items()} == {1: 1, 2: 1}


def test_an_epoch_that_is_trained_again_is_not_logged_again(tmp_path: Path) -> None:
    """After a kill, training may resume from a checkpoint before the last logged epoch."""
    recipe = load_recipe(None, {"tracking.to": ["tensorboard", "mlflow"]})
    rows = [ROW | {"epoch": epoch} for epoch in (1, 2, 3)]
    for history in ([rows[0]], rows[:2]), ([rows[0]], rows[:2], rows):
        trackers = Trackers(recipe, RunFolder(tmp_path), Listener())
        with trackers.opened():
            for rows_so_far in history:
                trackers.log_epochs(rows_so_far)
    expected = {1: [1.0], 2: [1.0], 3: [1.0]}
    assert read_tensorboard(tmp_path / "tracking" / "tensorboard")[0]["train_loss"] == expected
    assert read_mlflow((tmp_path / "tracking" / "mlflow").as_uri())[0]["train_loss"] == expected


# --- Trackers that fail ---


class Broken:
    """A client whose n-th call fails."""

    run_id = "x"
    calls = 0
    fails_at = 0

    def __init__(self, *_: Any) -> None:
        self._call()

    def _call(self, *_: Any) -> None:
        Broken.calls += 1
        if Broken.calls == Broken.fails_at:
            raise RuntimeError("no\nsuch server")

    log_epoch = log_final = close = _call


@pytest.fixture
def break_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Let the n-th call of every tracker fail."""
    monkeypatch.setattr(trackers_module, "_find_client", lambda _: Broken)

    def set_number(number: int) -> None:
        monkeypatch.setattr(Broken, "calls", 0)
        monkeypatch.setattr(Broken, "fails_at", number)

    return set_number


FAILURE = "wandb failed and is switched off (RuntimeError: no such server); the run continues without it"


@pytest.mark.parametrize("fails_at", range(1, 7))
def test_a_tracker_that_fails_causes_one_warning_and_is_dropped(
    tmp_path: Path, break_at: Any, fails_at: int
) -> None:
    break_at(fails_at)
    display = Listener()
    trackers = Trackers(load_recipe(None, {"tracking.to": ["wandb"]}), RunFolder(tmp_path), display)
    with trackers.opened():
        trackers.log_epochs([ROW])
        trackers.log_epochs([ROW, ROW | {"epoch": 2}])
        trackers.log_final({"accuracy": 1.0, "epochs": 2})
    assert display.warnings == ([FAILURE] if fails_at <= 5 else [])  # init, two epochs, final, close
    assert Broken.calls == min(fails_at, 5)


@pytest.mark.slow
def test_a_tracker_that_fails_does_not_fail_the_run(
    tiny: Path, image_folder: Path, tmp_path: Path, break_at: Any
) -> None:
    break_at(2)
    overrides = {"backbone.name": str(tiny), "data.path": str(image_folder), "data.workers": 0}
    recipe = load_recipe(None, overrides | {"training.epochs": 2, "tracking.to": ["wandb"]})
    display = Listener()
    assert run_job(recipe, tmp_path / "run", display).metrics["epochs"] == 2
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["state"] == "done"
    assert display.warnings.count(FAILURE) == 1


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from finetune.system.display import Display
from finetune.recipe import load_recipe
from finetune.runs.folder import RunFolder
from finetune.tracking.trackers import Trackers

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
row = dict(epoch=1, train_loss=1.0, eval_loss=1.0, eval_accuracy=0.5, lr=0.1, images_per_second=3.0)
recipe = load_recipe(None, {"tracking.to": [sys.argv[1]]})
trackers = Trackers(recipe, RunFolder(Path(sys.argv[2])), Display())
with trackers.opened():
    trackers.log_epochs([row])
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
    trackers.log_epochs([row, row | {"epoch": 2}])
    trackers.log_epochs([row, row | {"epoch": 2}, row | {"epoch": 3}])
    trackers.log_final({"accuracy": 1.0, "epochs": 3})
print("survived")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_full_disk_does_not_fail_the_run(tmp_path: Path, name: str) -> None:
    """Real files that cannot grow: the error is raised in the calling thread."""
    command = [sys.executable, "-c", FULL_DISK, name, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stdout) == (0, "survived\n"), result.stderr
    assert result.stderr.count("warning:") == 1 and f"{name} failed and is switched off" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_missing_server_does_not_fail_the_run(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    result = cli(*words_of(tiny, image_folder, tmp_path / "run", epochs=1, to=("mlflow",)))
    assert result.exit_code == 0
    assert result.stderr.count("mlflow failed and is switched off") == 1


@pytest.mark.usefixtures("needs_wandb")
def test_wandb_online_without_a_key_does_not_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    display = Listener()
    with Trackers(load_recipe(None, {"tracking.to": ["wandb"]}), RunFolder(tmp_path), display).opened():
        pass
    (warning,) = display.warnings
    assert "API key" in warning


def test_a_file_in_place_of_the_folder_causes_a_warning_per_tracker(tmp_path: Path) -> None:
    (tmp_path / "tracking").write_text("")
    display = Listener()
    trackers = Trackers(load_recipe(None, {"tracking.to": [*ALL]}), RunFolder(tmp_path), display)
    with trackers.opened():
        trackers.log_epochs([ROW])
    assert len(display.warnings) == 3


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", '{"mlflow": 3}', '{"mlflow": {"run_id": "x"}}', "\udcff", "[" * 100_000,
        '{"mlflow": {"run_id": "x", "epoch": Infinity}}',
    ],
)  # fmt: skip
def test_damaged_states_are_ignored(tmp_path: Path, text: str) -> None:
    (tmp_path / "tracking").mkdir()
    states = tmp_path / "tracking" / "trackers.json"
    states.write_bytes(text.encode(errors="surrogateescape"))
    display = Listener()
    trackers = Trackers(load_recipe(None, {"tracking.to": ["tensorboard"]}), RunFolder(tmp_path), display)
    with trackers.opened():
        trackers.log_epochs([ROW])
    assert display.warnings == []
    assert json.loads(states.read_text()) == {"tensorboard": {"run_id": "", "epoch": 1}}


# --- Before a run starts ---


@pytest.mark.parametrize("name", ALL)
def test_a_client_that_is_not_installed_is_refused_before_the_run(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    missing = [module for module in sys.modules if module.partition(".")[0] == name]
    for module in {name, *missing}:
        monkeypatch.setitem(sys.modules, module, None)
    result = cli(*words_of(tiny, image_folder, tmp_path / "run", to=(name,)))
    assert result.exit_code == ExitCode.ENVIRONMENT == 78
    assert f"pip install {name.replace('mlflow', 'mlflow-skinny')}" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_broken_client_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CLIENTS, "wandb", "finetune.tracking.trackers.NoSuchClass")
    with pytest.raises(EnvironmentFaultError, match="AttributeError"):
        check_trackers(["wandb"])


def test_trackers_are_off_by_default_and_no_client_is_imported(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path
) -> None:
    """(timm imports wandb wherever it is installed.)"""
    assert cli(*words_of(tiny, image_folder, tmp_path / "run", epochs=1, to=())).exit_code == 0
    assert not {client.rpartition(".")[0] for client in CLIENTS.values()} & set(sys.modules)
    assert not (tmp_path / "run" / "tracking").exists()


@pytest.mark.parametrize("value", ["wandb", "[wandbb]", "[3]", "null", "[[wandb]]", "{a: 1}"])
def test_invalid_lists_of_trackers_are_refused(cli: Cli, tmp_path: Path, value: str) -> None:
    result = cli("run", "-b", "x", "-d", tmp_path, "--set", f"tracking.to={value}")
    assert result.exit_code == ExitCode.USAGE
    if "{" not in value:
        assert "it must be a list of tensorboard, wandb or mlflow" in result.stderr


# --- What is logged ---


def test_only_numbers_are_logged_as_final_metrics() -> None:
    metrics = {"a": 1, "b": 0.5, "c": None, "d": True, "e": [1, 2], "f": "text", "g": {"h": 2, "i": [1]}}
    assert flatten_metrics(metrics) == {"a": 1.0, "b": 0.5, "g.h": 2.0}


def test_no_secret_of_the_recipe_is_logged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOME_TOKEN", "swordfish-4711")
    path = "https://me:hunter22@host/data?X-Amz-Signature=abcdef"
    recipe = load_recipe(None, {"data.path": path, "backbone.weights": "/x/swordfish-4711.safetensors"})
    run_info = describe_run(recipe, tmp_path / "swordfish-4711")
    text = str(run_info)
    assert "swordfish" not in text.replace(str(run_info.home), "")
    assert "hunter22" not in text and "abcdef" not in text
    assert run_info.settings["training.epochs"] == 10 and "epochs: 10" in run_info.recipe
