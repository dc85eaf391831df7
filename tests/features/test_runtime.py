"""ONNX Runtime computes what torch computes, is chosen by a rule, and torch runs what it cannot run."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from finetune.errors import UsageError
from finetune.features import runtime
from finetune.features.runtime import LEAST_PIXELS, choose_runtime, describe_runtime, open_forward
from finetune.system.display import SilentDisplay
from tests.conftest import Cli
from tests.faults.results import read_metrics
from tests.training.helpers import SmallNet, place

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SIZE = (3, 16, 16)
MANY = LEAST_PIXELS // 224**2


class Said(SilentDisplay):
    """A display that keeps what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, text: str, style: str = "") -> None:
        self.lines.append(text)


def images(number: int) -> Tensor:
    return torch.randn(number, *SIZE, generator=torch.Generator().manual_seed(number))


def opened(network: nn.Module, said: Said, forward=None):
    return open_forward("onnxruntime", network.eval(), forward or network, place(), SIZE, said)


@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_rows_are_those_of_torch_for_any_number_of_images(number: int) -> None:
    network, said = SmallNet(), Said()
    forward = opened(network, said)
    assert forward is not network and "ONNX Runtime (exported" in said.lines[0]
    with torch.no_grad():
        torch.testing.assert_close(forward(images(number)), network(images(number)), rtol=1e-4, atol=1e-5)


def test_images_in_channels_last_give_the_same_rows() -> None:
    forward = opened(SmallNet(), Said())
    batch = images(4)
    assert torch.equal(forward(batch), forward(batch.to(memory_format=torch.channels_last)))


class Branching(nn.Module):
    """Its graph depends on the number of images, so that a traced one is wrong for another number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, batch: Tensor) -> Tensor:
        rows = self.layer(batch).mean(dim=(2, 3))
        return rows if len(batch) > 1 else -rows


class Unknown(nn.Module):
    """An operation that the exporter does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, batch: Tensor) -> Tensor:
        return torch.fft.fft(self.layer(batch)).real.mean(dim=(2, 3))


@pytest.mark.parametrize(
    ("network", "reason"),
    [(Branching(), "other features"), (Unknown(), "ONNX Runtime cannot run it")],
    ids=["other rows", "unknown operation"],
)
def test_torch_runs_what_cannot_be_exported(
    network: nn.Module, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    said = Said()
    assert opened(network, said) is network
    assert said.lines[0].startswith("the network runs in torch: ") and reason in said.lines[0]
    assert capfd.readouterr() == ("", "")  # the exporter would print the whole graph


def test_a_network_larger_than_a_protobuf_runs_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "LARGEST_BYTES", 1000)
    said, network = Said(), SmallNet()
    assert opened(network, said) is network
    assert "too large" in said.lines[0]


def test_auto_takes_onnxruntime_where_an_export_pays() -> None:
    network, linear = SmallNet(), nn.Linear(2, 2)

    def chosen(network=network, device=CPU, precision="float32", number=MANY, size=224):
        return choose_runtime("auto", network, device, precision, number * size**2)

    assert chosen() == "onnxruntime"
    assert chosen(number=4 * MANY, size=112) == "onnxruntime"
    assert chosen(number=MANY - 1) == "torch"
    assert chosen(size=112) == "torch"
    assert chosen(linear) == "torch"
    assert chosen(device=GPU) == "torch"
    assert chosen(precision="bfloat16") == "torch"


def test_what_was_asked_for_is_taken_or_refused() -> None:
    network = SmallNet()
    assert choose_runtime("torch", network, CPU, "float32", MANY * 224**2) == "torch"
    assert choose_runtime("onnxruntime", network, CPU, "float32", 16**2) == "onnxruntime"
    for device, precision in ((GPU, "float32"), (CPU, "bfloat16")):
        with pytest.raises(UsageError, match="on a CPU in float32 only"):
            choose_runtime("onnxruntime", network, device, precision, MANY * 224**2)


def test_the_version_is_part_of_what_features_depend_on() -> None:
    import onnxruntime

    assert describe_runtime("onnxruntime") == f"onnxruntime {onnxruntime.__version__}"
    assert describe_runtime("torch") == "torch"


@pytest.mark.parametrize(
    "words",
    [("-s", "freeze"), ("-s", "top"), ("-s", "freeze", "--set", "strategy.features=all")],
    ids=["freeze", "top", "solved"],
)
def test_runs_in_both_runtimes_agree(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    """The run also compares its cached features with the whole network in torch."""
    found = {}
    for name in ("torch", "onnxruntime"):
        more = (*words, "--epochs", 2, "--batch-size", 8, "--workers", 0, "--set", f"runtime={name}")
        done = cli("run", "-b", tiny, "-d", image_folder, "-o", tmp_path / name, *more)
        assert done.exit_code == 0, done.stderr
        assert ("ONNX Runtime (exported" in done.stderr) == (name == "onnxruntime")
        found[name] = pd.read_csv(tmp_path / name / "predictions.csv").filter(like="prob_")
    pd.testing.assert_frame_equal(found["torch"], found["onnxruntime"], atol=1e-3, check_exact=False)
    assert read_metrics(tmp_path / "torch")["accuracy"] == read_metrics(tmp_path / "onnxruntime")["accuracy"]


def test_features_of_another_runtime_are_not_taken(
    cli: Cli, tiny: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def extract(name: str, output: str) -> str:
        words = ("-b", tiny, "-d", image_folder, "-o", tmp_path / output, "--set", f"runtime={name}")
        done = cli("extract", *words)
        assert done.exit_code == 0, done.stderr
        return done.stderr

    extract("torch", "one")
    assert "ONNX Runtime (exported" in extract("onnxruntime", "two")
    assert "ONNX Runtime (exported" not in extract("onnxruntime", "three")  # cached


@pytest.mark.parametrize("features", ["last", "all"])
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_predictions_of_many_images_are_those_of_torch(
    cli: Cli,
    tiny: Path,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    features: str,
) -> None:
    words = ("-s", "freeze", "--set", f"strategy.features={features}", "--workers", 0)
    assert cli("run", "-b", tiny, "-d", image_folder, "-o", tmp_path / "run", *words).exit_code == 0
    found = {}
    for least, name in ((LEAST_PIXELS, "torch"), (1, "onnxruntime")):
        monkeypatch.setattr(runtime, "LEAST_PIXELS", least)
        table = tmp_path / f"{name}.csv" if command == "predict" else tmp_path / name / "predictions.csv"
        given = [image_folder] if command == "predict" else ["--data", image_folder, "--allow-leaks"]
        output = table if command == "predict" else table.parent
        done = cli(command, tmp_path / "run", *given, "--output", output)
        assert done.exit_code == 0, done.stderr
        assert ("ONNX Runtime (exported" in done.stderr) == (name == "onnxruntime")
        found[name] = pd.read_csv(table)
    pd.testing.assert_frame_equal(found["torch"], found["onnxruntime"], rtol=0, atol=1e-4)
