from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Cli, FinishedRun


def test_a_list_can_be_searched(cli: Cli) -> None:
    result = cli("backbones", "--search", "squeezenet")
    header, *rows = result.stdout.splitlines()
    assert header.split() == ["name", "parameters", "input_size", "license", "weights"]
    assert [row.split()[0] for row in rows] == [
        "torchvision/squeezenet1_0.imagenet1k_v1",
        "torchvision/squeezenet1_1.imagenet1k_v1",
    ]
    assert "1,248,424" in rows[0]


def test_the_whole_list_as_json(cli: Cli) -> None:
    rows = json.loads(cli("backbones", "--json").stdout)
    assert len(rows) > 2000
    assert {row["source"] for row in rows} == {"timm", "torchvision", "zoo"}
    assert all(
        row["parameters"] > 0 and max(np.atleast_1d(row["input_size"])) >= 19 for row in rows
    )  # 19: a board of Go
    assert (
        {"installed", "download"}
        <= {row["weights"] for row in rows}
        <= {"installed", "here", "download", "none"}
    )


def test_a_search_without_results_is_reported(cli: Cli) -> None:
    result = cli("backbones", "--search", "no such thing")
    assert result.exit_code == 0
    assert "no backbone's name contains 'no such thing'" in result.stderr


@pytest.mark.parametrize(
    ("strategy", "factors"),
    [
        ("freeze", ["frozen"] * 4 + ["1.0"]),
        ("top", ["frozen"] * 3 + ["0.1", "1.0"]),
        ("full", ["0.01"] * 3 + ["0.1", "1.0"]),
        ("scratch", ["1.0"] * 5),
    ],
)
def test_one_backbone_stage_by_stage(cli: Cli, strategy: str, factors: list[str]) -> None:
    result = cli("backbones", "show", "squeezenet1_0", "-s", strategy, "--json")
    shown = json.loads(result.stdout)
    assert shown["parameters"] == 1248424 == sum(stage["parameters"] for stage in shown["stages"])
    assert [str(stage["factor"]) for stage in shown["stages"]] == factors
    assert [stage["role"] for stage in shown["stages"]] == ["stem", "body", "body", "body", "head"]
    text = cli("backbones", "show", "squeezenet1_0", "-s", strategy).stdout
    assert "features.12.squeeze ... features.12.expand3x3" in text


def test_a_folder_is_shown_too(cli: Cli, tiny: Path) -> None:
    result = cli("backbones", "show", tiny)
    assert result.exit_code == 0, result.output
    assert "weights     here" in result.stdout


def test_unknown_names_are_refused(cli: Cli) -> None:
    assert cli("backbones", "show", "resnet5").exit_code == 2
    assert cli("backbones", "show", "resnet18", "-s", "frieze").exit_code == 2


def test_recipes_are_listed_and_shown(cli: Cli) -> None:
    listed = cli("recipes").stdout
    for name in ("freeze", "top", "full", "scratch"):
        assert f"\n{name} " in f"\n{listed}"
        assert f"name: {name}" in cli("recipes", "show", name).stdout
    result = cli("recipes", "show", "topp")
    assert result.exit_code == 2
    assert "did you mean 'top'" in result.stderr


# --- layers, graph and chart ---------------------------------------------------------------------


def test_every_layer_is_shown(cli: Cli) -> None:
    facts = json.loads(cli("backbones", "show", "squeezenet1_0", "--layers", "--json").stdout)
    assert facts["total"]["parameters"] == 1248424
    assert facts["input_size"] == [3, 224, 224] and facts["batch_size"] == 1
    first = facts["layers"][1]
    assert (first["layer"], first["kind"], first["settings"]) == ("features.0", "Conv2d", "7x7/2")
    assert first["output"] == [96, 109, 109] and first["weights"] == 96 * 3 * 49
    assert first["multiply_adds"] == 109 * 109 * 96 * 3 * 49
    for key in ("activations", "weights", "parameters", "multiply_adds", "forward_bytes", "training_bytes"):
        assert facts["total"][key] == sum(layer[key] for layer in facts["layers"])
    result = cli("backbones", "show", "squeezenet1_0", "--layers", "--batch-size", 10)
    header, *rows = [line.split() for line in result.stdout.splitlines()[1:]]
    assert header[-3:] == ["multiply_adds", "forward", "training"]
    assert rows[-1][0] == "total" and rows[-1][-2] == f"{facts['total']['forward_bytes'] / 1e5:.2f}"
    own = next(row for row in rows if row[0] == "features.3")
    assert own[1:4] == ["Fire", "(itself)", "128x54x54"], "the concatenation of its branches"


def test_the_layers_are_drawn_as_a_graph(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "graph.svg"
    assert cli("backbones", "show", "squeezenet1_0", "--graph", path).exit_code == 0
    drawn = path.read_text(encoding="utf-8")
    assert drawn.startswith("<svg") and drawn.count(">concatenate<") == 8
    assert ">96x109x109<" in drawn and ">features.0 Conv2d 7x7/2<" in drawn
    again = cli("backbones", "show", "squeezenet1_0", "--graph", path)
    assert again.exit_code == 2 and "the file exists" in again.stderr
    other = cli("backbones", "show", "squeezenet1_0", "--graph", tmp_path / "graph.png")
    assert other.exit_code == 2 and "graph.svg" in other.stderr


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks are not built and timed."""
    from finetune.explain import backbone_chart

    monkeypatch.setattr(backbone_chart, "build_network", backbone_chart.build_outline)
    monkeypatch.setattr(backbone_chart, "place_network", lambda network, _: network)
    monkeypatch.setattr(backbone_chart, "time_forward", lambda *_: 0.02)


@pytest.mark.slow
@pytest.mark.usefixtures("instant")
def test_a_chart_of_published_accuracies(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "chart"
    names = ("torchvision/squeezenet1_1", "resnet18.tv_in1k", "torchvision/mobilenet_v2")
    result = cli("backbones", "chart", *names, "--output", out, "--json")
    assert result.exit_code == 0, result.output
    chart = json.loads(result.stdout)
    assert {path.name for path in out.iterdir()} == {
        "accuracy-operations.png",
        "accuracy-speed.png",
        "chart.csv",
        "chart.json",
    }
    assert [row["name"] for row in chart["rows"]] == list(names)
    assert [row["parameters"] for row in chart["rows"]] == [1235496, 11689512, 3504872]
    assert all(50 < row["accuracy"] < 90 and row["images_per_second"] == 50 for row in chart["rows"])
    assert "ImageNet" in chart["accuracy"]


@pytest.mark.slow
@pytest.mark.usefixtures("instant")
def test_a_chart_of_published_networks(cli: Cli, tmp_path: Path) -> None:
    names = ("cifar_resnet20", "zoo/cifar_wrn_40_4")
    result = cli("backbones", "chart", *names, "--output", tmp_path / "chart", "--json")
    assert result.exit_code == 0, result.output
    chart = json.loads(result.stdout)
    assert chart["accuracy"] == "published top-1 accuracy on CIFAR-10"
    assert [row["accuracy"] for row in chart["rows"]] == [91.25, 95.47]
    assert [row["parameters"] for row in chart["rows"]] == [269722, 8949210]


@pytest.mark.slow
@pytest.mark.usefixtures("instant")
def test_a_chart_of_runs(cli: Cli, finished_run: FinishedRun, tmp_path: Path) -> None:
    runs = [finished_run(strategy) for strategy in ("freeze", "full")]
    result = cli("backbones", "chart", *runs, "--output", tmp_path / "chart", "--json")
    assert result.exit_code == 0, result.output
    found = [row["accuracy"] for row in json.loads(result.stdout)["rows"]]
    metrics = [json.loads((run / "metrics.json").read_text()) for run in runs]
    assert found == [100 * one["accuracy"] for one in metrics]
    mixed = cli("backbones", "chart", runs[0], "resnet18.tv_in1k", "--output", tmp_path / "mixed")
    assert mixed.exit_code == 2 and "Name runs only, or backbones only" in mixed.stderr


def test_what_cannot_be_charted_is_refused(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    out = ("--output", tmp_path / "chart")
    alone = cli("backbones", "chart", "resnet18.tv_in1k", *out)
    assert alone.exit_code == 2 and "Name two backbones or more" in alone.stderr
    unknown = cli("backbones", "chart", tiny, "resnet18.tv_in1k", *out)
    assert unknown.exit_code == 2 and "no accuracy on ImageNet" in unknown.stderr
    mixed = cli("backbones", "chart", "cifar_resnet20", "resnet18.tv_in1k", *out)
    assert mixed.exit_code == 2 and "published for CIFAR-10" in mixed.stderr
    wrong = cli("backbones", "chart", "resnet5", "resnet18.tv_in1k", *out)
    assert wrong.exit_code == 2 and "did you mean" in wrong.stderr
    assert not (tmp_path / "chart").exists()
