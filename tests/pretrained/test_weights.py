"""Files are found, read without running anything, converted, counted, and refused when they do not fit."""

from __future__ import annotations

import json
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision.models as tv
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.errors import UsageError
from pretrained.backbone import load_backbone
from pretrained.catalog import Card, find_card
from pretrained.graph.classifier import head_parameters
from pretrained.loading import Match, load_weights
from pretrained.network import build_network
from pretrained.preprocessing import Preprocessing
from pretrained.state_dict import read_weights
from pretrained.weights import find_weights

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(1)
    return timm.create_model("test_resnet").state_dict()


@pytest.fixture(scope="module")
def card() -> Card:
    return find_card("timm/test_resnet")


def load(card: Card, file: Path, load_head: bool = False) -> tuple[nn.Module, Match]:
    network = build_network(card)
    return network, load_weights(network, card, file, head_parameters(network), load_head)


def same(network: nn.Module, state: State, skip: str = "fc.") -> bool:
    own = network.state_dict()
    return all(own[key].equal(value) for key, value in state.items() if not key.startswith(skip))


# --- finding -------------------------------------------------------------------------------------


def test_a_file_or_a_folder_with_one(card: Card, state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "any.safetensors")
    assert find_weights(card, str(tmp_path)) == tmp_path / "any.safetensors"
    assert find_weights(card, str(tmp_path / "any.safetensors")) == tmp_path / "any.safetensors"
    (tmp_path / "notes.txt").write_text("no weights")
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UsageError, match=r"several weight files: any.safetensors, other.pth"):
        find_weights(card, str(tmp_path))
    save_file(state, tmp_path / "model.safetensors")
    assert find_weights(card, str(tmp_path)).name == "model.safetensors"


def test_a_run_folder_gives_its_model(card: Card, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tiny, target_is_directory=True)
    (tmp_path / "checkpoint.pt").write_bytes(b"to go on, not to use")
    assert find_weights(card, str(tmp_path)) == tmp_path / "model" / "model.safetensors"


def test_nothing_there(card: Card, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        find_weights(card, str(tmp_path / "none.pth"))
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(UsageError, match=r"the folder holds no .safetensors, .pth"):
        find_weights(card, str(tmp_path / "folder.pth"))


def test_a_model_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_resnet"}))
    with pytest.raises(UsageError, match=r"the folder holds no"):
        find_weights(find_card(str(tmp_path)))


def test_no_weights_were_ever_published() -> None:
    with pytest.raises(UsageError, match="no weights were ever published") as caught:
        find_weights(find_card("timm/efficientnet_b6"))
    assert "--strategy scratch" in caught.value.fix


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pt", "w.bin", "w.pth.tar", "legacy.pth"])
def test_formats(card: Card, state: State, tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    if name.endswith("safetensors"):
        save_file(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=name != "legacy.pth")
    network, match = load(card, file)
    assert same(network, state)
    assert match.matched == match.total > 20
    assert match.missing == match.unused == ()
    assert match.head == ("fc.weight", "fc.bias")
    assert str(match) == (
        f"{match.total} of {match.total} tensors matched, 2 replaced (the head: fc.weight, fc.bias), "
        f"0 missing; from {file}"
    )


@pytest.mark.sample(8)
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize(
    "wrapper", [(), ("state_dict",), ("model",), ("state_dict_ema",), ("model", "state_dict")]
)
def test_wrapped_and_compiled(
    card: Card, state: State, tmp_path: Path, prefix: str, wrapper: tuple[str, ...]
) -> None:
    content: Any = {f"{prefix}{key}": value for key, value in state.items()}
    for key in wrapper:
        content = {key: content, "epoch": 3, "optimizer": {"lr": 0.1}}
    torch.save(content, tmp_path / "w.pth")
    network, match = load(card, tmp_path / "w.pth", load_head=True)
    assert same(network, state, skip="nothing")
    assert match.unused == ()


def test_a_part_compiled_within(state: State, tmp_path: Path) -> None:
    content = {key.replace("layer1.", "layer1._orig_mod."): value for key, value in state.items()}
    assert content.keys() != state.keys()
    torch.save(content, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").keys() == state.keys()


@pytest.mark.parametrize("name", ["state_dict_ema", "model_ema", "ema_state_dict", "ema", "ema_model"])
def test_averaged_weights_are_preferred(card: Card, state: State, tmp_path: Path, name: str) -> None:
    plain = {key: torch.zeros_like(value) for key, value in state.items()}
    torch.save({"state_dict": plain, name: state}, tmp_path / "w.pth")
    network, match = load(card, tmp_path / "w.pth")
    assert same(network, state)
    assert f"without the prefix '{name}.'" in str(match)


def _whole(tmp_path: Path) -> bytes:
    torch.save({"a": torch.arange(999.0)}, tmp_path / "whole.pth")
    return (tmp_path / "whole.pth").read_bytes()


def _legacy(tmp_path: Path) -> bytes:
    torch.save({"a": torch.arange(999.0)}, tmp_path / "l.pth", _use_new_zipfile_serialization=False)
    return (tmp_path / "l.pth").read_bytes()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<!DOCTYPE html><html>404</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00",
        b"\x00" * 64,
        bytes(range(256)),
        "half",
        "half of a legacy file",
        "a flipped bit",
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, suffix: str, content: bytes | str) -> None:
    if content == "half":
        content = _whole(tmp_path)[:1500]
    elif content == "half of a legacy file":
        content = _legacy(tmp_path)[:-100]
    elif content == "a flipped bit":
        damaged = bytearray(_whole(tmp_path))
        damaged[100] ^= 0xFF
        content = bytes(damaged)
    assert isinstance(content, bytes)
    file = tmp_path / f"damaged{suffix}"
    file.write_bytes(content)
    with pytest.raises(UsageError, match="the file cannot be read") as caught:
        read_weights(file)
    assert str(file) in str(caught.value)
    assert "weights_only" not in str(caught.value)  # PyTorch's own message advises to load it unsafely
    assert not content or "it is empty" not in str(caught.value)
    assert content or "it is empty" in str(caught.value)


def test_safetensors_cut_off(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "w.safetensors")
    content = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(content[:-8])
    with pytest.raises(UsageError, match="no whole safetensors file"):
        read_weights(tmp_path / "w.safetensors")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"x")
    (tmp_path / "w.pth").chmod(0)
    with pytest.raises(UsageError, match="Permission denied"):
        read_weights(tmp_path / "w.pth")


def test_what_the_system_says_is_passed_on(tmp_path: Path) -> None:
    (tmp_path / "loop.pth").symlink_to(tmp_path / "loop.pth")
    with pytest.raises(UsageError, match="Too many levels of symbolic links"):
        read_weights(tmp_path / "loop.pth")


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}, {"state_dict": {}}])
def test_no_tensors(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UsageError, match="it holds no tensors"):
        read_weights(tmp_path / "w.pth")


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.target}",))


@pytest.mark.parametrize("form", ["zip", "legacy", *range(6)])
def test_a_malicious_file_is_refused_and_not_run(tmp_path: Path, form: str | int) -> None:
    target, file = tmp_path / "executed", tmp_path / "evil.pth"
    content = {"conv1.weight": torch.ones(2, 2), "payload": Payload(target)}
    if isinstance(form, int):
        file.write_bytes(pickle.dumps({"payload": Payload(target)}, protocol=form))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UsageError) as caught:
        read_weights(file)
    assert not target.exists()
    if form != 0:  # the first protocol is text, and not told from other text
        assert "it holds more than tensors" in str(caught.value)
        assert "nothing else is ever loaded or run" in str(caught.value)
    assert "weights_only" not in str(caught.value)
    if form in ("zip", "legacy"):
        assert "posix.system" in str(caught.value)


def test_the_payload_is_a_real_one(tmp_path: Path) -> None:
    torch.save({"payload": Payload(tmp_path / "executed")}, tmp_path / "evil.pth")
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert (tmp_path / "executed").exists()


def test_whole_modules_and_arguments_are_refused_too(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(UsageError, match=r"more than tensors \(torch.nn.modules.linear.Linear\)"):
        read_weights(tmp_path / "module.pth")


# --- fitting -------------------------------------------------------------------------------------


def test_weights_of_another_network_are_refused(card: Card, tmp_path: Path) -> None:
    save_file(timm.create_model("test_efficientnet").state_dict(), tmp_path / "w.safetensors")
    total = len([key for key in build_network(card).state_dict() if not key.endswith("tracked")]) - 2
    with pytest.raises(
        UsageError, match=rf"only \d+ of the backbone's {total} tensors match \(\d+ %, under 90 %\)"
    ):
        load(card, tmp_path / "w.safetensors")


def plain_network(num_tensors: int) -> nn.Module:
    network = nn.Module()
    for index in range(num_tensors):
        setattr(network, f"weight{index}", nn.Parameter(torch.full((2,), float(index))))
    network.fc = nn.Linear(2, 2)
    return network


@pytest.mark.parametrize(
    ("num_tensors", "num_known", "percent"), [(10, 9, None), (30, 27, None), (10, 8, 80), (1000, 899, 89)]
)
def test_nine_tenths_are_enough_and_not_one_less(
    tmp_path: Path, num_tensors: int, num_known: int, percent: int | None
) -> None:
    network = plain_network(num_tensors)
    card = replace(find_card("torchvision/squeezenet1_0"), name="plain")
    known = {f"weight{index}": torch.zeros(2) for index in range(num_known)}
    save_file(known, tmp_path / "w.safetensors")
    arguments = (network, card, tmp_path / "w.safetensors", {"fc.weight", "fc.bias"}, False)
    if percent is not None:
        before = {key: value.clone() for key, value in network.state_dict().items()}
        expected = (
            rf"only {num_known} of the backbone's {num_tensors} tensors match \({percent} %, under 90 %\)"
        )
        with pytest.raises(UsageError, match=expected):
            load_weights(*arguments)
        assert all(value.equal(before[key]) for key, value in network.state_dict().items())
        return
    match = load_weights(*arguments)
    assert (match.matched, match.total) == (num_known, num_tensors)
    assert len(match.missing) == num_tensors - num_known
    assert f"{num_known} of {num_tensors} tensors matched, 2 replaced" in str(match)
    assert f"{num_tensors - num_known} missing (weight{num_known}" in str(match)


def test_missing_and_unused_are_counted_and_named(card: Card, state: State, tmp_path: Path) -> None:
    changed = {key: value for key, value in state.items() if key != "layer1.0.conv1.weight"}
    changed |= {f"extra{index}": torch.ones(1) for index in range(5)}
    save_file(changed, tmp_path / "w.safetensors")
    _, match = load(card, tmp_path / "w.safetensors")
    assert match.missing == ("layer1.0.conv1.weight",)
    assert len(match.unused) == 5
    assert "1 missing (layer1.0.conv1.weight), 5 unused in the file (extra0, extra1, extra2, ...)" in str(
        match
    )


def test_files_of_before_2018_have_no_counters(card: Card, state: State, tmp_path: Path) -> None:
    """torchvision's own ResNet and VGG files are such: a sixth of a ResNet's tensors are counters."""
    save_file({k: v for k, v in state.items() if "tracked" not in k}, tmp_path / "w.safetensors")
    _, match = load(card, tmp_path / "w.safetensors")
    assert match.matched == match.total
    assert "0 missing" in str(match)


def test_a_kept_head_must_fit(card: Card, state: State, tmp_path: Path) -> None:
    save_file({k: v for k, v in state.items() if k != "fc.bias"}, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=r"the classifier does not fit: fc.bias"):
        load(card, tmp_path / "w.safetensors", load_head=True)
    _, match = load(card, tmp_path / "w.safetensors")
    assert match.head_replaced


def test_a_head_of_other_size_is_replaced_only(card: Card, tmp_path: Path) -> None:
    torch.manual_seed(3)
    other = timm.create_model("test_resnet", num_classes=5).state_dict()
    save_file(other, tmp_path / "w.safetensors")
    network, match = load(card, tmp_path / "w.safetensors")
    assert same(network, other)
    assert match.matched == match.total
    with pytest.raises(UsageError, match="the classifier does not fit"):
        load(card, tmp_path / "w.safetensors", load_head=True)


def test_the_head_is_left_alone_unless_it_is_kept(card: Card, state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "w.safetensors")
    for load_head in (False, True):
        network, _ = load(card, tmp_path / "w.safetensors", load_head)
        assert network.state_dict()["fc.weight"].equal(state["fc.weight"]) == load_head


def test_weights_that_are_no_numbers_are_refused(card: Card, state: State, tmp_path: Path) -> None:
    broken = dict(state) | {"layer1.0.conv1.weight": state["layer1.0.conv1.weight"] * float("nan")}
    save_file(broken, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=r"1 of its tensors hold NaN or infinity \(layer1.0.conv1.weight\)"):
        load(card, tmp_path / "w.safetensors")


def test_random_weights_say_so(card: Card) -> None:
    match = load_backbone(card, classes=["a", "b"], pretrained=False).match
    assert str(match).startswith("random weights: ")
    assert "none loaded" in str(match)


# --- converting ----------------------------------------------------------------------------------


def original_convnext(state: State) -> State:
    """Names as in facebookresearch/ConvNeXt."""
    rules = [
        (r"^stem\.(\d)", r"downsample_layers.0.\1"),
        (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
        (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
        (r"\.conv_dw\.", ".dwconv."),
        (r"\.mlp\.fc1\.", ".pwconv1."),
        (r"\.mlp\.fc2\.", ".pwconv2."),
        (r"^head\.norm\.", "norm."),
        (r"^head\.fc\.", "head."),
    ]

    def rename(key: str) -> str:
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        return key

    return {rename(key): value for key, value in state.items()}


@pytest.mark.parametrize("num_classes", [1000, 5])
def test_an_original_convnext_is_renamed_by_timm(tmp_path: Path, num_classes: int) -> None:
    torch.manual_seed(2)
    theirs = timm.create_model(
        "convnext_atto_ols", num_classes=num_classes, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)
    )
    card = replace(
        find_card("convnext_atto_ols"), model_args=(("depths", (1, 1, 1, 1)), ("dims", (8, 16, 24, 32)))
    )
    original = original_convnext(theirs.state_dict())
    assert len(original.keys() - theirs.state_dict().keys()) > 30
    torch.save({"model": original}, tmp_path / "w.pth")
    network, match = load(card, tmp_path / "w.pth", load_head=num_classes == 1000)
    assert match.matched == match.total
    assert match.missing == match.unused == ()
    assert same(network, theirs.state_dict(), skip="head.fc" if num_classes == 5 else "nothing")


def test_position_embeddings_are_resized_as_timm_does(tmp_path: Path) -> None:
    torch.manual_seed(2)
    theirs = timm.create_model("test_vit")
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    card = find_card("test_vit")
    card = card.with_input(replace(card.preprocessing, img_size=96))
    network, match = load(card, tmp_path / "w.safetensors")
    overlay = {"file": str(tmp_path / "w.safetensors")}
    reference = timm.create_model("test_vit", pretrained=True, img_size=96, pretrained_cfg_overlay=overlay)
    assert match.matched == match.total
    assert network.state_dict()["pos_embed"].shape != theirs.state_dict()["pos_embed"].shape
    assert same(network, reference.state_dict(), skip="head")


def test_random_weights_never_count_as_matched(tmp_path: Path) -> None:
    """timm loads some families (DLA) with strict=False: what it builds may be wholly random."""
    save_file({"foreign": torch.ones(3)}, tmp_path / "w.safetensors")
    card = find_card("dla46x_c")
    with pytest.raises(UsageError, match="only 0 of the backbone's"):
        load(card, tmp_path / "w.safetensors")


def test_torchvisions_densenet_files_have_older_names(tmp_path: Path) -> None:
    torch.manual_seed(2)
    theirs = tv.densenet121().state_dict()
    pattern = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))([12])\.")
    older = {pattern.sub(r"\1.\2.", k): v for k, v in theirs.items() if "tracked" not in k}
    assert len(older.keys() - theirs.keys()) > 500
    torch.save(older, tmp_path / "w.pth")
    network, match = load(find_card("torchvision/densenet121"), tmp_path / "w.pth")
    assert match.matched == match.total
    assert same(network, {key: theirs[key] for key in theirs if "tracked" not in key}, skip="classifier")


def test_torchvisions_vit_at_another_size(tmp_path: Path) -> None:
    with torch.device("meta"):
        card = find_card("torchvision/vit_b_16.imagenet1k_swag_e2e_v1")
        assert build_network(card).image_size == 384  # type: ignore[comparison-overlap]
        card = card.with_input(Preprocessing(img_size=100))
        with pytest.raises(UsageError, match=r"patches of 16 pixels do not divide 100 pixels: 8 % of"):
            build_network(card)


def test_torchvisions_vit_takes_resized_positions(tmp_path: Path) -> None:
    from pretrained.loading import _convert_for_torchvision

    def small(image_size: int) -> tv.VisionTransformer:
        return tv.VisionTransformer(image_size, 16, 1, 2, 16, 16)

    theirs = small(64).state_dict()
    converted = _convert_for_torchvision(dict(theirs), small(96))
    small(96).load_state_dict(dict(converted))
    assert converted["encoder.pos_embedding"].shape == (1, 37, 16)


def test_nothing_of_the_loader_stays_replaced(card: Card, state: State, tmp_path: Path) -> None:
    before = timm.models._builder.load_pretrained
    save_file(state, tmp_path / "w.safetensors")
    load(card, tmp_path / "w.safetensors")
    assert timm.models._builder.load_pretrained is before
