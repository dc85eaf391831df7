"""The exported folder: plain timm loads it with its labels and preprocessing, and gives the same logits."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

from finetune.errors import DiskError
from finetune.exporters import folder as module
from finetune.exporters.config import build_config, loads_in_timm
from finetune.exporters.folder import export_model, load_exported, measure_round_trip, write_model
from pretrained.backbone import Backbone, load_backbone
from pretrained.catalog import HeadChoice, find_card
from pretrained.network import build_network

METRICS = {
    "strategy": "top",
    "accuracy": 0.9,
    "balanced_accuracy": 0.8,
    "f1_macro": 0.7,
    "num_samples": 10,
    "split": "val",
    "split_chose_checkpoint": True,
}
FILES = {"README.md", "config.json", "model.safetensors"}


def build(name: str, img_size: int | None = None, head: HeadChoice = "replace", **kwargs: Any) -> Backbone:
    torch.manual_seed(0)
    card = find_card(name)
    if img_size:
        card = card.with_input(replace(card.preprocessing, img_size=img_size, mean=(0.1, 0.2, 0.3)))
    labels = kwargs.pop("classes", ("ant", "bee", "蜂"))
    backbone = load_backbone(card, classes=labels, head=head, pretrained=False, **kwargs)
    with torch.no_grad():
        for value in backbone.network.state_dict().values():
            if value.is_floating_point():
                value.add_(0.01 * torch.rand(value.shape))
    return backbone


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
def test_transformers_gives_the_same_logits_and_labels(tmp_path: Path, name: str) -> None:
    backbone = build(name, 64 if name != "test_vit" else None)
    network = backbone.network.eval()
    export_model(backbone, network, tmp_path / "model", METRICS)
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()
    assert loaded.config.id2label == dict(enumerate(backbone.card.label_names))
    images = torch.randn(2, *backbone.card.preprocessing.input_size)
    with torch.inference_mode():
        assert network(images).equal(loaded(pixel_values=images).logits)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("name", "img_size", "dropout"),
    [
        ("test_resnet", None, 0.0),
        ("test_resnet", 64, 0.5),
        ("test_efficientnet", 64, 0.2),
        ("test_convnext", 64, 0.0),
        ("test_vit", None, 0.3),
        ("test_vit", 96, 0.0),
        ("ghostnet_050", 64, 0.1),
    ],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_plain_timm_gives_the_same_logits(
    tmp_path: Path, name: str, img_size: int | None, dropout: float, channels_last: bool
) -> None:
    backbone = build(name, img_size, dropout=dropout)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = backbone.network.to(memory_format=layout).eval()  # type: ignore[call-overload]
    export_model(backbone, network, tmp_path / "model", METRICS)
    assert {path.name for path in (tmp_path / "model").iterdir()} == FILES
    reloaded = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    reloaded = reloaded.to(memory_format=layout)
    size = backbone.card.preprocessing.img_size
    images = torch.randn(2, 3, size, size).to(memory_format=layout)
    with torch.inference_mode():
        assert network(images).equal(reloaded(images))
        ours = load_exported(tmp_path / "model").to(memory_format=layout)  # type: ignore[call-overload]
        assert network(images).equal(ours(images))
    view = resolve_model_data_config(reloaded)
    assert {
        key: tuple(v) if isinstance(v, list) else v for key, v in view.items()
    } == backbone.card.preprocessing.to_timm()
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["label_names"] == ["ant", "bee", "蜂"]
    assert reloaded.pretrained_cfg["label_names"] == ["ant", "bee", "蜂"]
    assert measure_round_trip(network, tmp_path / "model", images) < 1e-6
    card = find_card(str(tmp_path / "model"))
    assert card.preprocessing == backbone.card.preprocessing
    assert (card.label_names, card.dropout, card.head) == (("ant", "bee", "蜂"), dropout, "replace")


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("torchvision/squeezenet1_1", "replace"),
        pytest.param("torchvision/alexnet", "drop_fc", marks=pytest.mark.slow),
        pytest.param("timm/vgg11", "drop_fc", marks=pytest.mark.slow),
        pytest.param("timm/poolformerv2_s12", "replace", marks=pytest.mark.slow),
    ],
)
def test_every_folder_loads_with_its_head_kept(tmp_path: Path, name: str, head: HeadChoice) -> None:
    backbone = build(name, head=head, img_size=64, dropout=0.2)
    export_model(backbone, backbone.network, tmp_path / "model", METRICS)
    card = find_card(str(tmp_path / "model"))
    again = load_backbone(card, classes=card.label_names, head="keep")
    assert (again.card.head, again.card.dropout, again.card.license) == (head, 0.2, backbone.card.license)
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert backbone.network.eval()(images).equal(again.network.eval()(images))
    third = load_backbone(card, classes=["x", "y"], head="replace")
    export_model(third, third.network, tmp_path / "third", METRICS)
    with torch.inference_mode():
        assert third.network.eval()(images).equal(load_exported(tmp_path / "third")(images))
    text = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert ("timm.create_model" in text) == loads_in_timm(backbone.card) == (name == "timm/poolformerv2_s12")


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["volo_d1_224", "caformer_s18"])
def test_heads_of_more_than_one_layer_export_as_linear(name: str) -> None:
    with torch.device("meta"):
        backbone = load_backbone(find_card(name), classes=["a", "b"], pretrained=False)
    config = build_config(backbone.card, backbone.network)
    with torch.device("meta"):
        plain = timm.create_model(config["architecture"], **config["model_args"])
    assert plain.state_dict().keys() == backbone.network.state_dict().keys()


def test_licence_and_tag_are_those_of_the_weights(tmp_path: Path) -> None:
    """They are not those of the architecture's default weights, even after a second export."""
    card = find_card("convnextv2_atto.fcmae")
    assert card.license == "cc-by-nc-4.0"
    with torch.device("meta"):
        network = timm.create_model("test_resnet", num_classes=1)
    mine = replace(
        find_card("test_resnet"), license="cc-by-nc-4.0", tag="mine", origin="arXiv:1", place="folder"
    )
    config = build_config(replace(mine, num_classes=1, label_names=("a",)), network)
    assert config["pretrained_cfg"]["license"] == "cc-by-nc-4.0"
    assert (config["pretrained_cfg"]["tag"], config["pretrained_cfg"]["paper_ids"]) == ("mine", "arXiv:1")
    assert "origin_url" not in config["pretrained_cfg"]


def test_an_existing_folder_is_replaced_completely(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "pytorch_model.bin").write_text("old")
    backbone = build("test_resnet", 64)
    export_model(backbone, backbone.network, target, METRICS)
    assert {path.name for path in target.iterdir()} == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("step", ["write_bytes", "write_json", "write_text", "rename"])
def test_a_failing_write_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("old")
    backbone = build("test_resnet", 64)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "rename":
        rename = Path.rename

        def fail_for_the_part(self: Path, to: Path) -> Path:
            if self.name.endswith(".part"):
                fail()
            return rename(self, to)

        monkeypatch.setattr(Path, "rename", fail_for_the_part)
    else:
        monkeypatch.setattr(module, step, fail)
    with pytest.raises(DiskError, match="Free some space"):
        export_model(backbone, backbone.network, target, METRICS)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (target / "config.json").read_text() == "old"


def test_a_round_trip_restores_the_mode_of_each_layer(tmp_path: Path) -> None:
    backbone = build("test_resnet", 64)
    export_model(backbone, backbone.network, tmp_path / "model", METRICS)
    network = backbone.network.train()
    frozen = next(layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)).eval()
    assert measure_round_trip(network, tmp_path / "model", torch.randn(1, 3, 64, 64)) < 1e-6
    assert network.training
    assert not frozen.training
    with torch.no_grad():
        next(network.parameters()).add_(1)
    assert measure_round_trip(network, tmp_path / "model", torch.randn(1, 3, 64, 64)) > 1e-6


def test_the_model_card_names_no_source_for_random_weights(tmp_path: Path) -> None:
    backbone = build("test_resnet", 64)  # random
    export_model(backbone, backbone.network, tmp_path / "model", METRICS)
    text = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert "The network was trained from random weights." in text
    assert "base_model" not in text
    assert "apache" not in text
    assert not config["pretrained_cfg"].get("tag")
    assert not config["pretrained_cfg"].get("license")
    loaded = replace(backbone, match=replace(backbone.match, source="weights.pth"))
    export_model(loaded, loaded.network, tmp_path / "loaded", METRICS)
    assert (
        "The initial weights are those of `timm/test_resnet`"
        in (tmp_path / "loaded" / "README.md").read_text()
    )


@pytest.mark.parametrize("kind", ["plain", "stages", "torchvision"])
def test_plain_timm_predicts_the_same_or_raises(tmp_path: Path, kind: str) -> None:
    """A network that plain timm cannot build must not load there with a warning and random values."""
    name = "torchvision/squeezenet1_1" if kind == "torchvision" else "timm/test_resnet"
    backbone = build(name, img_size=64)
    network, card = backbone.network, backbone.card
    if kind == "stages":
        card = replace(card, taps=(("layer2", 0, False), ("layer4", 0, False)))
        network = build_network(card)
    write_model(tmp_path, card, network.eval(), "")
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = network(images)
        assert expected.equal(load_exported(tmp_path)(images))
        if kind == "plain":
            plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
            torch.testing.assert_close(plain(images), expected)
            return
    with pytest.raises(RuntimeError, match=f"Unknown model .*{card.architecture}.*only finetune loads"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
