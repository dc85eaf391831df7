from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Cli


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
    assert {row["source"] for row in rows} == {"timm", "torchvision"}
    assert all(row["parameters"] > 0 and row["input_size"] >= 28 for row in rows)
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
