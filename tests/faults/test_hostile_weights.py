"""Weights, configs and names that a stranger wrote: refused with a sentence, before they cost anything."""

from __future__ import annotations

import json
import os
import pickle
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from finetune.errors import EnvironmentFaultError, FinetuneError, UsageError
from pretrained import state_dict as module
from pretrained.backbone import load_backbone
from pretrained.catalog import find_card
from pretrained.config import MAX_CONFIG_BYTES, MAX_TEXT_LENGTH
from pretrained.hub import MAX_FILE_BYTES, find_hub_file
from pretrained.state_dict import read_weights

# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.bin"])
def test_a_file_too_large_is_not_opened(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # sparse: it takes no space
    monkeypatch.setattr(module, "_read", lambda _: pytest.fail("it was opened"))
    with pytest.raises(UsageError, match=r"it has 68,719,476,737 bytes, more than 68,719,476,736"):
        read_weights(tmp_path / name)


def test_the_limit_itself_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "w.safetensors")
    monkeypatch.setattr(module, "MAX_FILE_BYTES", (tmp_path / "w.safetensors").stat().st_size)
    assert read_weights(tmp_path / "w.safetensors").keys() == {"a"}


def repack(source: Path, target: Path) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))


def test_packed_zeros_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.zeros(5_000_000)}, tmp_path / "whole.pth")
    repack(tmp_path / "whole.pth", tmp_path / "bomb.pth")
    assert (tmp_path / "bomb.pth").stat().st_size < 50_000
    with monkeypatch.context() as patch:
        patch.setattr(module, "_read", lambda _: pytest.fail("it was unpacked"))
        with pytest.raises(UsageError, match=r"bytes unpack to 20,00\d,\d{3}, more than 10 times as many"):
            read_weights(tmp_path / "bomb.pth")
    torch.save({"a": torch.randn(5_000)}, tmp_path / "whole.pth")
    repack(tmp_path / "whole.pth", tmp_path / "packed.pth")
    assert read_weights(tmp_path / "packed.pth")["a"].shape == (5_000,)


# --- safetensors ---------------------------------------------------------------------------------

ENTRY: dict[str, Any] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def safetensors(header: Any, data: bytes = bytes(8), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


MALFORMED = {
    "header of 2^60 bytes": safetensors({"a": ENTRY}, length=2**60),
    "header of 2^64 - 1 bytes": safetensors({"a": ENTRY}, length=2**64 - 1),
    "header beyond the file": safetensors({"a": ENTRY}, length=10_000),
    "header as long as a brace is": safetensors({"a": ENTRY}, length=ord("{") + 256),
    "header as long as an angle is": safetensors({"a": ENTRY}, length=ord("<") + 256),
    "header as long as gzip begins": safetensors({"a": ENTRY}, length=0x8B1F),
    "no header": safetensors(b""),
    "cut off": safetensors({"a": ENTRY}, bytes(4)),
    "shape beyond its bytes": safetensors({"a": ENTRY | {"shape": [3]}}),
    "shape of 2^80 numbers": safetensors({"a": ENTRY | {"shape": [2**40, 2**40]}}),
    "negative shape": safetensors({"a": ENTRY | {"shape": [-2]}}),
    "offsets backwards": safetensors({"a": ENTRY | {"data_offsets": [8, 0]}}),
    "offsets beyond the file": safetensors({"a": ENTRY | {"data_offsets": [2**60, 2**60 + 8]}}),
    "overlap": safetensors({"a": ENTRY, "b": ENTRY}),
    "a hole": safetensors({"a": ENTRY | {"data_offsets": [8, 16]}}, bytes(16)),
    "more than is named": safetensors({"a": ENTRY}, bytes(16)),
    "unknown numbers": safetensors({"a": ENTRY | {"dtype": "X"}}),
    "a name twice, at two places": safetensors(
        json.dumps({"a": ENTRY, "b": ENTRY | {"data_offsets": [8, 16]}}).replace('"b"', '"a"').encode(),
        bytes(16),
    ),
    "nesting": safetensors(b"[" * 100_000),
    "a list": safetensors([]),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_safetensors(tmp_path: Path, name: str) -> None:
    (tmp_path / "w.safetensors").write_bytes(MALFORMED[name])
    with pytest.raises(
        UsageError, match=r"it is no whole safetensors file \(.{5,}\)\nFetch or save"
    ) as caught:
        read_weights(tmp_path / "w.safetensors")
    assert len(caught.value.found) < 400


def test_the_plain_file_of_these_is_read(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(safetensors({"a": ENTRY}))
    assert read_weights(tmp_path / "w.safetensors")["a"].tolist() == [0, 0]


# --- pickles -------------------------------------------------------------------------------------


class Gadget:
    """A payload in a pickle of its own, which PyTorch itself would unpack without the safe reader."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        class Payload:
            def __reduce__(inner) -> Any:
                return (os.mkdir, (str(self.marker),))

        return (torch.storage._load_from_bytes, (pickle.dumps(Payload()),))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_payload_inside_a_payload_is_not_run(tmp_path: Path, legacy: bool) -> None:
    marker, file = tmp_path / "executed", tmp_path / "evil.pth"
    content = {"conv1.weight": torch.ones(2, 2), "storage": Gadget(marker)}
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UsageError, match=r"it holds more than tensors .*_load_from_bytes"):
        read_weights(file)
    assert not marker.exists()


def test_the_gadget_is_a_real_one(tmp_path: Path) -> None:
    """Newer PyTorch reads the inner pickle safely too; the outer one it would run."""
    torch.save({"storage": Gadget(tmp_path / "executed")}, tmp_path / "evil.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "evil.pth", weights_only=True)
    with pytest.raises(Exception, match=r".") as caught:
        torch.load(tmp_path / "evil.pth", weights_only=False)
    assert (tmp_path / "executed").exists() or "weights_only" in str(caught.value)


def test_a_file_that_holds_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UsageError, match="it holds no tensors"):
        read_weights(tmp_path / "w.pth")


ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": Tensor.to_sparse,
    "quantised": lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
    "without content": lambda tensor: tensor.to("meta"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD)
def test_tensors_that_no_network_takes(tmp_path: Path, kind: str) -> None:
    state = timm.create_model("test_resnet").state_dict()
    torch.save(state | {"conv1.0.weight": ODD[kind](state["conv1.0.weight"])}, tmp_path / "w.pth")
    with pytest.raises(
        UsageError, match=r"its tensor 'conv1.0.weight' is sparse, quantised or without content"
    ):
        load_backbone(find_card("test_resnet"), classes=["a", "b"], weights=str(tmp_path / "w.pth"))


def test_a_tensor_far_larger_than_its_file_costs_nothing(tmp_path: Path) -> None:
    state = timm.create_model("test_resnet").state_dict()
    torch.save(state | {"x" * 100_000: torch.ones(1).expand(10**15)}, tmp_path / "w.pth")
    match = load_backbone(find_card("test_resnet"), classes=["a", "b"], weights=str(tmp_path / "w.pth")).match
    assert len(match.unused) == 1
    assert len(str(match)) < 1_000


# --- configs -------------------------------------------------------------------------------------

Config = Callable[..., str]


@pytest.fixture
def config(tiny: Path, tmp_path: Path) -> Config:
    """Write the tiny network's folder with other values, and return its name."""

    def write(changes: dict[str, Any], inner: dict[str, Any] | None = None) -> str:
        own = json.loads((tiny / "config.json").read_text())
        content = own | changes | {"pretrained_cfg": own["pretrained_cfg"] | (inner or {})}
        (tmp_path / "config.json").write_text(json.dumps(content))
        if not (tmp_path / "model.safetensors").exists():
            (tmp_path / "model.safetensors").symlink_to(tiny / "model.safetensors")
        return f"local-dir:{tmp_path}"

    return write


NOT_A_NETWORK = [
    ({"num_classes": 10**9}, "num_classes is 1000000000, not a number between 0 and 200000"),
    ({"num_classes": 10**400}, "num_classes is 1000"),
    ({"num_classes": -1}, "num_classes is -1"),
    ({"num_classes": True}, "num_classes is True"),
    ({"num_classes": float("inf")}, "num_classes is inf"),
    ({"num_classes": float("nan")}, "num_classes is nan"),
    ({"label_names": [["a"], "b"]}, "label_names are not all text"),
    ({"label_names": {"first": "a"}}, "invalid literal"),
    ({"model_args": {"channels": [10**6] * 4}}, "a number of model_args is 1000000"),
    ({"model_args": {"layers": [10**9]}}, "a number of model_args is 1000000000"),
    ({"model_args": {"block_args": {"deep": [{"x": 1e300}]}}}, "a number of model_args is 1e+300"),
    ({"model_args": {"layers": [1] * 1_000}}, "model_args hold 1,000 numbers"),
    ({"finetune": {"dropout": 5}}, "dropout is 5"),
    ({"finetune": {"dropout": float("nan")}}, "dropout is nan"),
    ({"architecture": "hf-hub:org/name"}, "timm does not know its architecture 'hf-hub:org/name'"),
    ({"architecture": "../../etc/passwd"}, "timm does not know its architecture"),
    ({"architecture": "a" * 500_000}, "timm does not know its architecture 'aaa"),
]
NOT_A_VIEW = [
    ({"input_size": [3, 10**6, 10**6]}, "input_size is 1000000, not a number between 16 and 4096"),
    ({"input_size": [3, -5, -5]}, "input_size is -5"),
    ({"input_size": [3, 32, 32.5]}, "input_size is 32.5, not a whole number"),
    ({"input_size": "large"}, "input_size is 'g'"),
    ({"crop_pct": -1}, "crop_pct is -1"),
    ({"crop_pct": "0.9"}, "crop_pct is '0.9'"),
    ({"crop_mode": "evil"}, "crop_mode is 'evil', not one of center, squash, border"),
    ({"std": [0, 0, 0]}, "std is 0.0, not a number between 1e-06 and 1e+06"),
    ({"mean": [float("nan")] * 3}, "mean is nan, not a number between -1e+06 and 1e+06"),
    ({"interpolation": ["bilinear"]}, "unhashable"),
]


@pytest.mark.parametrize(
    ("changes", "inner", "found"),
    [*((changes, {}, found) for changes, found in NOT_A_NETWORK), *(({}, *rest) for rest in NOT_A_VIEW)],
    ids=lambda part: str(part)[:40],
)
def test_values_that_no_network_has(
    config: Config, changes: dict[str, Any], inner: dict[str, Any], found: str
) -> None:
    name = config(changes, inner)
    began = time.process_time()
    with pytest.raises(UsageError) as caught:
        find_card(name)
    assert time.process_time() - began < 2
    assert found in caught.value.found
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize(
    "arguments",
    [
        {"act_layer": "os.system"},
        {"block": "__import__"},
        {"norm_layer": {"a": 1}},
        {"layers": "many"},
        {"channels": [-1] * 4},
        {"model_name": "resnet18"},
        {"global_pool": "evil"},
        {"output_stride": 3},
    ],
    ids=str,
)
def test_arguments_that_build_nothing(config: Config, arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="cannot build it"):
        load_backbone(find_card(config({"model_args": arguments})), classes=["a", "b"])


@pytest.mark.parametrize("arguments", [{"num_heads": 0}, {"patch_size": 0}], ids=str)
def test_divisions_by_zero(config: Config, arguments: dict[str, Any]) -> None:
    card = find_card(config({"architecture": "vit_tiny_patch16_224", "model_args": arguments}))
    with pytest.raises(UsageError, match="timm cannot build it: ZeroDivisionError"):
        load_backbone(card, classes=["a", "b"])


@pytest.mark.parametrize(
    "arguments",
    [
        {"pretrained": True},
        {"checkpoint_path": "/etc/passwd"},
        {"pretrained_cfg_overlay": {"file": "/etc/passwd"}},
        {"cache_dir": "/tmp"},
    ],
    ids=str,
)
def test_arguments_that_would_read_other_files_are_left_out(
    config: Config, arguments: dict[str, Any]
) -> None:
    match = load_backbone(find_card(config({"model_args": arguments})), classes=["a", "b"]).match
    assert match.matched == match.total


@pytest.mark.parametrize("classifier", ["..fc..", "a.b.c", "", ["__class__", "fc.weight"], 7])
def test_a_classifier_is_found_without_its_name(config: Config, classifier: object) -> None:
    match = load_backbone(find_card(config({}, {"classifier": classifier})), classes=["a", "b"]).match
    assert match.head == ("fc.weight", "fc.bias")


def test_text_of_a_card_is_short_and_printable(config: Config) -> None:
    evil = "\x1b[31mred\r\n\u202e" + "x" * 10_000
    inner = {"license": evil, "tag": [evil], "paper_ids": [evil, 5]}
    card = find_card(config({"architecture": "test_resnet"}, inner))
    for text in (card.license, card.tag, card.origin):
        assert text.isprintable() and 0 < len(text) <= MAX_TEXT_LENGTH


def test_label_names_are_compared_and_never_written(config: Config) -> None:
    names = ["../../x", "\x1b[31m", "/etc/passwd", "a" * 1_000, *map(str, range(6))]
    card = find_card(config({"label_names": names}))
    assert card.label_names == ("../../x", "\\x1b[31m", "/etc/passwd", "a" * 252 + "...", *names[4:])
    assert load_backbone(card, classes=["a", "b"]).card.label_names == ("a", "b")


def test_a_config_too_large_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**40)  # sparse
    began = time.process_time()
    with pytest.raises(UsageError, match=f"config.json is larger than {MAX_CONFIG_BYTES:,} bytes"):
        find_card(str(tmp_path))
    assert time.process_time() - began < 2


# --- names ---------------------------------------------------------------------------------------

NAMES = [
    "hf-hub:../x",
    "hf-hub:/etc/passwd",
    "hf-hub:a/b@../../../etc/passwd",
    "hf-hub:a/b@" + "x" * 300,
    "hf-hub:a/b@\0",
    "hf-hub:a\0b",
    "hf-hub:a/b\n",
    "hf-hub:a/b@v1\n",
    "hf-hub:\u2024\u2024/x",
    "hf-hub:\uff0e\uff0e/x",
    "hf-hub:a/b@%2e%2e/",
    "hf-hub:a--b/c",
    "hf-hub:a/b.git",
    "hf-hub:\udcff",
    "local-dir:a\0b",
    "local-dir:" + "x" * 300,
    "local-dir:" + "x" * 10_000,
    "local-dir:/dev/zero",
    "local-dir:\x1b[31m",
    "x" * 300,
    "a/" * 5_000,
    "\0",
    "timm/\0",
    "resnet18.\x1b[31m",
    "/proc/self/mem",
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name[:30]))
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        find_card(name)


@pytest.mark.parametrize("revision", ["", "@v1.0", "@refs/pr/1", "@0123abc", "@my-branch_2"])
def test_a_revision_may_be_named(revision: str, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFaultError, match="offline mode is on"):
        find_hub_file("--backbone x", f"org/name{revision}", ("config.json",), offline=True)


@given(
    st.sampled_from(["", "hf-hub:", "local-dir:", "timm/", "torchvision/", "resnet18.", "hf-hub:a/b@"]),
    st.one_of(
        st.text(st.characters(codec=None), max_size=40),
        st.lists(st.sampled_from(["..", "/", ".", "\0", "@", "a", "~", "\\", ":", "%2e", "\n"])).map("".join),
    ),
)
def test_any_name_is_a_card_or_a_refusal(prefix: str, rest: str) -> None:
    try:
        card = find_card(prefix + rest, offline=True)
    except FinetuneError as error:
        assert error.found and error.fix
    else:
        assert card.library in ("timm", "torchvision")


@pytest.mark.parametrize("weights", ["a\0b", "x" * 300, "x" * 10_000, "/dev/zero", "/dev/stdin/x", ""])
def test_paths_of_weights_that_are_none(weights: str) -> None:
    with pytest.raises(UsageError):
        load_backbone(find_card("test_resnet"), classes=["a", "b"], weights=weights)


def test_weights_of_a_pipe_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.pth")
    with pytest.raises(UsageError):
        load_backbone(find_card("test_resnet"), classes=["a", "b"], weights=str(tmp_path / "w.pth"))
