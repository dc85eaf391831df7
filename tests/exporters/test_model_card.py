"""The model card: the hub's parser reads it, whatever the names of classes and folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from ruamel.yaml import YAML

from finetune.exporters.config import find_base_model
from finetune.exporters.folder import export_model
from finetune.exporters.model_card import TrainingData, build_readme
from pretrained.backbone import load_backbone
from pretrained.catalog import Card, find_card
from pretrained.config import read_name

OLD: dict[str, Any] = {
    "strategy": "top",
    "accuracy": 0.9,
    "balanced_accuracy": 0.8,
    "f1_macro": 0.7,
    "num_samples": 10,
    "split": "val",
    "split_chose_checkpoint": True,
}
"""Metrics as an early version recorded them."""
NEW = OLD | {
    "backbone": "timm/resnet18.a1_in1k",
    "num_train": 40,
    "roc_auc": None,
    "top5_accuracy": 1.0,
    "loss": 0.3,
    "intervals": {"accuracy": [0.81, 0.97], "f1_macro": [0.6, 0.8]},
    "calibration": {"temperature": 1.5, "ece": 0.2, "ece_calibrated": 0.05},
    "classes_not_judged": ["wasp"],
    "most_confused": [{"label": "an|t", "predicted": "bee", "count": 3, "share": 0.3}],
    "split": "test",
    "split_chose_checkpoint": False,
}
NASTY = (
    "a`b",
    "``",
    "<script>x</script>",
    "- x: [y",
    "ümläut 蜂 🐝",
    "a|b",
    "'\"",
    "two\nlines",
    "---",
    "# h",
)


def card_of(name: str = "resnet18.a1_in1k", **keys: Any) -> Card:
    values = {"num_classes": 2, "label_names": ("ant", "bee")} | keys
    return replace(find_card(name), **values)


def parse(text: str) -> dict[str, Any]:
    empty, front, _ = text.split("---\n", 2)
    assert empty == ""
    return dict(YAML(typ="safe").load(front))


def test_the_hub_parses_metrics_licence_and_base_model() -> None:
    data = TrainingData("insects", {"ant": {"train": 20, "test": 6}, "bee": {"train": 20, "test": 4}})
    text = build_readme(card_of(temperature=1.5), NEW, "weights.pth", data)
    read = ModelCard(text).data
    assert (read.license, read.base_model, read.library_name) == (
        "apache-2.0",
        "timm/resnet18.a1_in1k",
        "timm",
    )
    assert read.pipeline_tag == "image-classification"
    assert read.eval_results is not None
    assert {one.metric_type: one.metric_value for one in read.eval_results} == {
        "accuracy": 0.9,
        "top5_accuracy": 1.0,
        "balanced_accuracy": 0.8,
        "f1": 0.7,
        "loss": 0.3,
    }
    assert {(one.dataset_name, one.dataset_split) for one in read.eval_results} == {("insects", "test")}
    for line in (
        "| accuracy | 0.9000 | 0.8100 to 0.9700 |",
        "| macro F1 | 0.7000 | 0.6000 to 0.8000 |",
        "| balanced accuracy | 0.8000 |  |",
        "Expected calibration error 0.2000; 0.0500 with the temperature 1.5",
        "These images were held out",
        "No image of these classes was tested: `wasp`.",
        "`an|t` predicted as `bee` (30 %)",
        "`insects`: 40 training images; 10 images of the `test` split were tested.",
        "| `bee` | 20 | 4 |",
        "Divide them by the temperature 1.5 ",
        "The initial weights are those of `timm/resnet18.a1_in1k` (apache-2.0",
    ):
        assert line in text, line
    assert "ROC" not in text


def test_the_log_loss_is_given_with_and_without_the_temperature() -> None:
    calibration = NEW["calibration"] | {"loss": 0.3, "loss_calibrated": 0.25, "same_images": True}
    text = build_readme(card_of(temperature=1.5), NEW | {"calibration": calibration}, "weights.pth")
    assert "| log loss (nats) | 0.3000 |  |\n| log loss with the temperature (nats) | 0.2500 |  |" in text
    assert "cross-fitted in five folds" in text
    assert "apply softmax to get calibrated probabilities" in text
    assert "probabilities that the metrics are computed from" not in text
    plain = build_readme(card_of(), NEW, "weights.pth")
    assert "log loss with the temperature" not in plain
    assert "cross-fitted" not in plain
    assert "Output: logits; softmax gives the probabilities that the metrics are computed from." in plain


def test_test_images_that_were_trained_on_are_reported() -> None:
    text = build_readme(card_of(), NEW | {"num_leaked": 2, "num_seen_by_backbone": 1}, "weights.pth")
    section = text.partition("## Metrics")[2].partition("##")[0]
    start = "**Of the 10 test images,"
    assert (
        f"{start} 2 have an exact copy among the images that this model was trained on: these metrics"
        in section
    )
    assert (
        f"{start} 1 have an exact copy among the images that its initial weights were trained on" in section
    )
    for counts in ({"num_leaked": 0, "num_seen_by_backbone": 0}, {"num_leaked": None}, {}):
        assert "exact copy" not in build_readme(card_of(), NEW | counts, "weights.pth")


def test_the_metrics_of_an_old_run_are_enough_for_a_card() -> None:
    text = build_readme(card_of(), OLD, "weights.pth")
    assert "| accuracy | 0.9000 |" in text
    assert "95 %" not in text
    assert "calibration" not in text
    assert "optimistic" in text
    assert len(ModelCard(text).data.eval_results or ()) == 3


def test_a_model_without_metrics_has_none_in_its_card() -> None:
    text = build_readme(card_of(), {}, "x")
    assert "This model came without metrics." in text
    assert "model-index" not in parse(text)
    assert "metrics" not in parse(text)


@pytest.mark.parametrize("name", ["timm/test_resnet", "torchvision/squeezenet1_1"])
def test_names_do_not_break_the_card(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    backbone = load_backbone(find_card(name), classes=NASTY, pretrained=False)
    place = {"place": "hub", "location": "timm/test_resnet.r160_in1k"} if "timm" in name else {}
    backbone = replace(backbone, card=replace(backbone.card, license="other: [mine] #1", **place))
    export_model(backbone, backbone.network, tmp_path / "model", OLD)
    text = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    values = parse(text)
    assert (values["license"], values["license_name"]) == ("other", "other: [mine] #1")
    assert values["library_name"] == ("timm" if "timm" in name else "finetune")
    assert values.get("base_model") == ("timm/test_resnet.r160_in1k" if "timm" in name else None)
    assert "`<script>x</script>`" in text
    assert "`` a`b ``" in text
    assert "``` `` ```" in text
    assert "`two lines`" in text
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert tuple(config["label_names"]) == NASTY
    assert find_card(str(tmp_path / "model")).label_names == tuple(map(read_name, NASTY))


@pytest.mark.parametrize("name", NASTY)
def test_the_name_of_a_folder_does_not_break_the_front_matter(name: str) -> None:
    text = build_readme(card_of(), OLD, "x", TrainingData(f"{name}\x85\x07", {name: {"train": 1}}))
    index = parse(text)["model-index"]
    assert index[0]["results"][0]["dataset"]["name"] == f"{name}\x85\x07"
    table = text.partition("## Training data")[2].partition("##")[0]
    assert [line.replace("\\|", "").count("|") for line in table.splitlines() if line.startswith("|")] == [
        3
    ] * 3


def test_the_card_contains_no_path_of_this_machine() -> None:
    metrics = NEW | {"backbone": "local-dir:/home/me/secret/run"}
    text = build_readme(card_of(place="folder", location="/home/me/secret/run"), metrics, "/home/me/secret")
    assert "secret" not in text
    assert "another run or folder" in text


def test_the_base_model_is_inherited(tmp_path: Path) -> None:
    """A run that started from another run has the base model of that one."""
    folder = tmp_path / "model"
    folder.mkdir()
    card = card_of(place="folder", location=str(folder))
    for base, expected in (("timm/x.y", "timm/x.y"), ("a: b", ""), (None, ""), (3, "")):
        config = {"architecture": "resnet18", "finetune": {"base_model": base}}
        (folder / "config.json").write_text(json.dumps(config))
        assert find_base_model(card) == expected
    (folder / "config.json").write_text(json.dumps({"architecture": "resnet18", "finetune": [1]}))
    assert find_base_model(card) == ""
    (folder / "config.json").unlink()
    assert find_base_model(card) == ""
    assert find_base_model(card_of("torchvision/alexnet")) == ""
