"""Checkpoints as training scripts write them, and weights of networks that are nearly the same."""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import adapt_input_conv
from torch import Tensor

from finetune.errors import UsageError
from pretrained.backbone import load_backbone
from pretrained.blocks import find_further_blocks, find_further_layers
from pretrained.catalog import find_card
from pretrained.loading import check_complete
from pretrained.network import build_network
from pretrained.twins import check_twins

State = dict[str, Tensor]
CLASSES = ["a", "b"]


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(1)
    return dict(timm.create_model("test_resnet").state_dict())


def load(file: Path) -> Any:
    return load_backbone(find_card("test_resnet"), classes=CLASSES, weights=str(file))


WRAPPED = [
    "model_state_dict.",
    "net.",
    "params.",
    "teacher.backbone.",
    "state_dict.model.backbone.",
    "encoder.",
    "timm_model.",
    "0.",
    "state_dict.module.encoder_q.",
    "any.thing.",
]


@pytest.mark.sample(8)
@pytest.mark.parametrize("prefix", WRAPPED)
@pytest.mark.parametrize("nested", [False, True])
def test_any_wrapper_or_prefix_is_left_out_and_said(
    state: State, tmp_path: Path, prefix: str, nested: bool
) -> None:
    first, _, rest = prefix.partition(".")
    flat = {f"{rest if nested else prefix}{key}": value for key, value in state.items()}
    torch.save({first: flat, "epoch": 3} if nested else flat, tmp_path / "w.pth")
    backbone = load(tmp_path / "w.pth")
    assert backbone.network.state_dict()["conv1.0.weight"].equal(state["conv1.0.weight"])
    assert f"without the prefix {prefix!r}" in str(backbone.match)


@pytest.mark.parametrize("wrapper", ["_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"])
def test_wrappers_of_single_layers_are_left_out(state: State, tmp_path: Path, wrapper: str) -> None:
    wrapped = {key.replace(".0.", f".0.{wrapper}.", 1): value for key, value in state.items()}
    torch.save(wrapped, tmp_path / "w.pth")
    assert load(tmp_path / "w.pth").match.missing == ()


@pytest.mark.parametrize(
    ("other", "taken"),
    [("gradients", "weights"), ("momentum_buffer", "p"), ("model_weights", "ema_weights"), ("v", "net_w")],
)
def test_of_two_sets_of_tensors_the_weights_are_taken(
    state: State, tmp_path: Path, other: str, taken: str
) -> None:
    zeros = {key: torch.zeros_like(value) for key, value in state.items()}
    torch.save({other: zeros, taken: state}, tmp_path / "w.pth")
    backbone = load(tmp_path / "w.pth")
    assert backbone.network.state_dict()["conv1.0.weight"].equal(state["conv1.0.weight"])


def test_the_content_decides_and_not_the_suffix(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "w.pth")
    torch.save(state, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        assert load(tmp_path / name).match.missing == ()


FOREIGN = {
    "w.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", "a pointer of git-lfs"),
    "w.pth": (b"\n<!DOCTYPE html><html>", "a web page"),
    "w.bin": (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"),
    "config.json": (b'{"architecture": "resnet18"}', "JSON"),
    "w.pth.gz": (b"\x1f\x8b\x08", "packed with gzip"),
    "w.pth.tar": (bytes(257) + b"ustar" + bytes(300), "a tar archive"),
    "w.onnx": (b"\x08\x07\x12\x07pytorch", "an ONNX file"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_without_weights_is_named_as_what_it_is(tmp_path: Path, name: str) -> None:
    content, kind = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=f"cannot be read: it is {kind}"):
        load(tmp_path / name)


def test_archives_and_shards_are_named_as_what_they_are(state: State, tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", a=np.ones(2))
    with ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.writestr("w.pth", b"")
    for name, kind in (("w.npz", "an archive of NumPy"), ("w.zip", "a zip archive")):
        with pytest.raises(UsageError, match=kind):
            load(tmp_path / name)
    for number in (1, 2):
        save_file(state, tmp_path / f"model-{number:05}-of-00002.safetensors")
    with pytest.raises(UsageError, match="divided among 2 files"):
        load(tmp_path)


def test_classes_and_pairs_are_named(state: State, tmp_path: Path) -> None:
    torch.save({"model": state, "tags": frozenset("ab")}, tmp_path / "w.pth")
    assert load(tmp_path / "w.pth").match.missing == ()
    torch.save({"model": state, "epochs": range(3)}, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"more than tensors \(range\)"):
        load(tmp_path / "w.pth")
    torch.save(list(state.items()), tmp_path / "w.pth")
    with pytest.raises(UsageError, match="a list of 92 tensors without names"):
        load(tmp_path / "w.pth")


def test_settings_numbers_and_paths_beside_the_tensors(state: State, tmp_path: Path) -> None:
    beside = {
        "args": argparse.Namespace(lr=0.1, data=pathlib.Path("data")),
        "best": np.float64(0.9),
        "log": collections.defaultdict(list, {"loss": [1.0]}),
        "last": collections.deque([1]),
    }
    for legacy in (False, True):
        content = {"net": state, **beside}
        torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
        assert load(tmp_path / "w.pth").match.missing == ()


def test_the_refusal_says_what_the_names_begin_with(tmp_path: Path) -> None:
    torch.save({"model": {"body.weight": torch.ones(2), "neck.weight": torch.ones(2)}}, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"holds 2 tensors whose names begin with 'model'.*'layer"):
        load(tmp_path / "w.pth")
    torch.save(torch.ones(2), tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"a single tensor of shape \(2,\), without a name"):
        load(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("small", "deep", "head", "first"),
    [
        ("resnet18", "resnet34", "fc.weight", "layer1.2"),
        ("convnext_tiny", "convnext_small", "head.fc.weight", "stages.2.blocks.9"),
        ("efficientnet_b0", "efficientnet_b1", "classifier.weight", "blocks.0.1"),
    ],
)
def test_further_blocks_of_a_deeper_sibling(small: str, deep: str, head: str, first: str) -> None:
    with torch.device("meta"):
        own, theirs = (timm.create_model(name).state_dict() for name in (small, deep))
    assert find_further_blocks(own, [key for key in theirs if key not in own], [head])[0] == first


def test_leftovers_are_no_further_blocks(state: State) -> None:
    unused = ["decoder_blocks.0.a.weight", "decoder_blocks.0.b.weight", "aux1.fc.weight", "fc2.weight"]
    assert find_further_blocks(state, unused, ["fc.weight"]) == []


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("plain", "other", "head", "first"),
    [
        ("regnetx_002", "regnety_002", "head.fc.weight", "s1.b1.se.fc1"),
        ("resnet26t", "ecaresnet26t", "fc.weight", "layer1.0.se.conv"),
        ("efficientnet_lite0", "efficientnet_b0", "classifier.weight", "blocks.0.0.se.conv_reduce"),
        ("resnet50_gn", "resnet50", "fc.weight", "bn1"),
        ("nfnet_f0", "dm_nfnet_f0", "head.fc.weight", "stages.0.0"),
    ],
)
def test_further_layers_in_the_blocks_of_a_sibling(plain: str, other: str, head: str, first: str) -> None:
    with torch.device("meta"):
        own, theirs = (timm.create_model(name).state_dict() for name in (plain, other))
    assert find_further_layers(own, [key for key in theirs if key not in own], [head])[0] == first


def test_weights_of_a_sibling_with_further_layers_are_refused(state: State, tmp_path: Path) -> None:
    for last in ("total_ops", "relative_position_index"):  # counters and buffers are leftovers
        extra = {f"layer{stage}.0.se.{last}": torch.ones(1) for stage in (1, 2)}
        save_file(state | extra, tmp_path / "w.safetensors")
        assert load(tmp_path / "w.safetensors").match.missing == ()
    extra = {f"layer{stage}.0.se.fc1.weight": torch.ones(2, 2) for stage in (1, 2)}
    save_file(state | extra, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=r"2 layers inside the network's blocks .*\(layer1.0.se.fc1"):
        load(tmp_path / "w.safetensors")


def test_weights_of_a_deeper_sibling_are_refused(state: State, tmp_path: Path) -> None:
    further = {key.replace("layer1.0.", "layer1.1."): value for key, value in state.items()}
    torch.save({**further, **state}, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"1 further blocks .*\(layer1.1\)"):
        load(tmp_path / "w.pth")


@pytest.mark.parametrize("channels", [1, 4])
def test_a_first_convolution_is_adapted_and_said(tmp_path: Path, channels: int) -> None:
    torch.manual_seed(2)
    theirs = timm.create_model("test_resnet", in_chans=channels).state_dict()
    save_file(theirs, tmp_path / "w.safetensors")
    backbone = load(tmp_path / "w.safetensors")
    assert backbone.match.missing == ()
    assert f"(16, {channels}, 3, 3) in the file and (16, 3, 3, 3)" in backbone.match.notes[0]
    mine, old = backbone.network.state_dict()["conv1.0.weight"], theirs["conv1.0.weight"]
    if channels == 1:
        torch.testing.assert_close(mine.sum(dim=1, keepdim=True), old)
    else:
        torch.testing.assert_close(mine, old[:, :3] * 4 / 3)


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_vit", "repvgg_a0", "torchvision/squeezenet1_1", "torchvision/googlenet"]
)
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_weights_of_rgb_are_adapted_to_other_channels_as_timm_does(
    tmp_path: Path, name: str, channels: int
) -> None:
    torch.manual_seed(2)
    card = find_card(name)
    theirs = build_network(card).state_dict()
    save_file(theirs, tmp_path / "w.safetensors")
    view = replace(card.preprocessing, kind="bands", channels=channels, mean=(), std=())
    backbone = load_backbone(card.with_input(view), classes=CLASSES, weights=str(tmp_path / "w.safetensors"))
    key = next(key for key, value in theirs.items() if value.ndim == 4)
    found = backbone.network.state_dict()[key]
    assert found.equal(adapt_input_conv(channels, theirs[key]))
    assert f"the first convolution {key} is" in backbone.match.notes[0] and not backbone.match.missing
    images = torch.randn(2, *view.input_size)
    assert backbone.network.eval()(images).shape == (2, 2)
    if name == "test_resnet":
        overlay = {"file": str(tmp_path / "w.safetensors")}
        timms = timm.create_model(name, pretrained=True, in_chans=channels, pretrained_cfg_overlay=overlay)
        assert found.equal(timms.state_dict()[key])


def test_other_shapes_are_refused_with_both(state: State, tmp_path: Path) -> None:
    save_file(state | {"conv1.0.weight": torch.ones(16, 13, 3, 3)}, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="is 16 x 13 x 3 x 3 in the file and 16 x 3 x 3 x 3 in the network"):
        load(tmp_path / "w.safetensors")


def test_a_frozen_stage_has_no_random_tensor(state: State, tmp_path: Path) -> None:
    save_file({k: v for k, v in state.items() if k != "layer1.0.conv1.weight"}, tmp_path / "w.safetensors")
    backbone = load(tmp_path / "w.safetensors")
    check_complete(backbone.match, ["conv1.0.weight"], backbone.card)
    with pytest.raises(UsageError, match=r"no layer1.0.conv1.weight; 1 tensor would stay random"):
        check_complete(backbone.match, ["layer1.0.conv1.weight"], backbone.card)


@pytest.mark.parametrize(
    ("name", "size", "fix"),
    [
        ("vit_small_patch14_dinov2", 96, "84 or 98"),
        ("convnext_atto", 98, "96 or 100"),
        ("pit_ti_224", 101, "96 or 104"),
    ],
)
def test_a_size_that_the_patches_do_not_divide(name: str, size: int, fix: str) -> None:
    card = find_card(name)
    card = card.with_input(replace(card.preprocessing, img_size=size))
    with torch.device("meta"), pytest.raises(UsageError, match="do not divide") as caught:
        load_backbone(card, classes=CLASSES, pretrained=False)
    assert fix in caught.value.fix


def test_a_size_that_the_forward_does_not_take() -> None:
    card = find_card("mvitv2_tiny")
    card = card.with_input(replace(card.preprocessing, img_size=214))
    with pytest.raises(UsageError, match="its forward fails on images of this size: IndexError") as caught:
        load_backbone(card, classes=CLASSES, pretrained=False)
    assert "published at 224" in caught.value.fix


def test_twins_with_other_pixels(tmp_path: Path) -> None:
    card = find_card("efficientnet_lite0")
    with torch.device("meta"):
        network = timm.create_model("efficientnet_lite0")
    for name in ("w.pth", "efficientnet_lite0.pth"):
        note = check_twins(network, card, tmp_path / name)
        assert "the mean (0.485, 0.456, 0.406)" in note
        assert "also fits tf_efficientnet_lite0" in note
    with pytest.raises(UsageError, match="it is of tf_efficientnet_lite0"):
        check_twins(network, card, tmp_path / "tf_efficientnet_lite0-1a2b.pth")
    save_file({"a": torch.ones(1)}, tmp_path / "w.safetensors", {"model": "efficientnet_lite0"})
    assert check_twins(network, card, tmp_path / "w.safetensors") == ""


def test_other_weights_of_the_same_architecture_with_other_pixels(tmp_path: Path) -> None:
    with torch.device("meta"):
        network = timm.create_model("vit_small_patch16_224")
    card, dino = find_card("vit_small_patch16_224"), "vit_small_patch16_224.dino"
    assert f"also fits deit_small_patch16_224, {dino}" in check_twins(network, card, tmp_path / "w.pth")
    hub = tmp_path / f"models--timm--{dino}" / "snapshots" / "1a2b" / "model.safetensors"
    for path in (tmp_path / f"{dino}.pth", tmp_path / "dino_deitsmall16_pretrain.pth", hub):
        with pytest.raises(UsageError, match=f"it is of {dino}") as caught:
            check_twins(network, card, path)
        assert f"--backbone timm/{dino}" in caught.value.fix
        assert check_twins(network, find_card(dino), path) == ""
    assert "also fits" in check_twins(network, card, tmp_path / "dinov2.pth")
    assert check_twins(network, card, tmp_path / "vit_small_patch16_224.pth") == ""
    own = replace(card.preprocessing, mean=find_card(dino).preprocessing.mean)
    own = replace(own, std=find_card(dino).preprocessing.std)
    assert check_twins(network, card.with_input(own), hub) == ""


def test_folders_of_transformers_and_files_as_backbones(state: State, tmp_path: Path) -> None:
    save_file({f"timm_model.{key}": value for key, value in state.items()}, tmp_path / "model.safetensors")
    wrapper = {"architecture": "test_resnet", "model_type": "timm_wrapper", "num_classes": 1000}
    (tmp_path / "config.json").write_text(json.dumps(wrapper))
    assert load_backbone(find_card(str(tmp_path)), classes=CLASSES).match.missing == ()
    other = {"model_type": "vit", "architectures": ["ViTForImageClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(UsageError, match=r"of the type 'vit' \(ViTForImageClassification\)"):
        find_card(str(tmp_path))
    with pytest.raises(UsageError, match="it is a file") as caught:
        find_card(str(tmp_path / "model.safetensors"))
    assert "--backbone NAME --weights" in caught.value.fix
