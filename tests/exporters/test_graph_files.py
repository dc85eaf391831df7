"""ONNX and torch.export files, their metadata and the files beside them, read by other libraries."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn

from finetune.errors import UsageError
from finetune.exporters.deployed import Interface, build_program
from finetune.exporters.graph_files import (
    describe_input,
    describe_view,
    read_versions,
    write_companions,
    write_onnx,
    write_program,
)
from pretrained.catalog import Card, find_card
from pretrained.preprocessing import ImgSize, Preprocessing, Resize

LABELS = ("ant", "two  spaces ", "蜂")


@pytest.fixture(scope="module")
def card() -> Card:
    card = find_card("timm/test_resnet")
    view = replace(card.preprocessing, img_size=64)
    return replace(card, preprocessing=view, num_classes=3, label_names=LABELS, temperature=1.5)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3).eval()


@pytest.mark.slow
def test_onnx_metadata_holds_labels_preprocessing_and_temperature(
    card: Card, network: nn.Module, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    interface = Interface("nhwc", is_calibrated=True)
    path = write_onnx(build_program(network, card, interface), tmp_path, card, interface, 20)
    assert capfd.readouterr().out == ""  # stdout is for results only
    assert [one.name for one in tmp_path.iterdir()] == ["model.onnx"]
    onnx.checker.check_model(str(path), full_check=True)
    assert read_versions(path) == {"opset": 20, "ir_version": 9}
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape, given.type) == ("images", ["batch", 64, 64, 3], "tensor(uint8)")
    assert (made.name, made.shape, made.type) == ("probabilities", ["batch", 3], "tensor(float)")
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["label_names"]) == list(LABELS)
    assert float(told["temperature"]) == 1.5
    assert json.loads(told["preprocessing"])["in_the_graph"][0] == {"step": "divide", "by": 255}
    for batch in (1, 5):
        found = session.run(None, {"images": np.zeros((batch, 64, 64, 3), np.uint8)})[0]
        assert found.sum(axis=1) == pytest.approx(1)


@pytest.mark.slow
def test_torch_loads_the_exported_program(card: Card, network: nn.Module, tmp_path: Path) -> None:
    path = write_program(build_program(network, card, Interface()), tmp_path)
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(torch.export.load(path).module()(images), network(images), atol=1e-6)


class Unknown(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.linalg.eigvals(images.mean(1)).real[:, :3]


@pytest.mark.slow
def test_an_operation_that_onnx_lacks_is_refused(card: Card, tmp_path: Path) -> None:
    program = build_program(Unknown(), card, Interface())
    with pytest.raises(
        UsageError, match=r"exporting test_resnet: it cannot be converted to ONNX opset 18 \(.+\)"
    ):
        write_onnx(program, tmp_path, card, Interface(), 18)


def test_labels_and_preprocessing_are_written_beside_a_graph(card: Card, tmp_path: Path) -> None:
    write_companions(tmp_path, card, Interface())
    assert (tmp_path / "labels.txt").read_text(encoding="utf-8").splitlines() == list(LABELS)
    told = json.loads((tmp_path / "preprocessing.json").read_text(encoding="utf-8"))
    assert told["label_names"] == list(LABELS)
    assert (told["input"]["dtype"], told["input"]["layout"]) == ("float32", "NCHW")
    assert [step["step"] for step in told["before_the_graph"]] == [
        "decode",
        "resize",
        "center_crop",
        "divide",
        "normalize",
    ]
    assert told["in_the_graph"] == []
    assert told["output"] == {
        "name": "logits",
        "shape": ["batch", 3],
        "temperature": 1.5,
        "temperature_applied": False,
    }
    nameless = describe_input(replace(card, label_names=()), Interface("nchw", True))
    assert nameless["label_names"] == ["0", "1", "2"]
    assert nameless["output"]["temperature_applied"] is True
    write_companions(tmp_path, replace(card, label_names=("a", "a", "a (1)")), Interface())
    assert (tmp_path / "labels.txt").read_text().splitlines() == ["a (0)", "a (1) (1)", "a (1)"]


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("img_size", [48, (32, 64)])
def test_the_preprocessing_steps_are_those_of_timm(mode: Resize, crop_pct: float, img_size: ImgSize) -> None:
    """The steps of ``preprocessing.json``, done with Pillow alone, give timm's pixels."""
    view = Preprocessing(img_size=img_size, crop_pct=crop_pct, resize=mode, interpolation="bilinear")
    pixels = np.random.default_rng(1).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    _, resize, crop = describe_view(view)
    if "shorter_side" in resize:
        scale = resize["shorter_side"] / 80
        size = (int(120 * scale), resize["shorter_side"])
    elif "longer_side" in resize:
        size = (resize["longer_side"], round(80 * resize["longer_side"] / 120))
    elif "covers" in resize or "fits_in" in resize:
        choose, (height, width) = (max, resize["covers"]) if "covers" in resize else (min, resize["fits_in"])
        scale = choose(height / 80, width / 120)
        size = (round(120 * scale), round(80 * scale))
    else:
        size = (resize["width"], resize["height"])
    small = image.resize(size, Image.Resampling.BILINEAR)
    page = Image.new("RGB", (crop["width"], crop["height"]), tuple(crop.get("pad_with", (0, 0, 0))))
    page.paste(small, (round((crop["width"] - size[0]) / 2), round((crop["height"] - size[1]) / 2)))
    expected = create_transform(**view.to_timm(), is_training=False, normalize=False)(image)
    assert np.array_equal(np.asarray(page).transpose(2, 0, 1), expected.numpy())
