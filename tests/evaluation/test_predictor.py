from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config
from torchvision.transforms import v2

import finetune
from finetune.data.decode import decode_image
from finetune.errors import DataError, FinetuneError, UsageError


@pytest.fixture
def images(image_folder: Path) -> list[Path]:
    return sorted((image_folder / "val").rglob("*.jpg"))


def plain_timm(folder: Path, images: list[Image.Image], temperature: float = 1.0) -> np.ndarray:
    """Return the probabilities by plain timm, one image at a time."""
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    view = create_transform(**resolve_model_data_config(network), is_training=False)
    with torch.inference_mode():
        logits = torch.cat([network(view(image.convert("RGB"))[None]) for image in images])
    return (logits / temperature).softmax(1).numpy()


def copy_model(tiny: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_predictions_are_those_of_plain_timm(tiny: Path, images: list[Path]) -> None:
    predictor = finetune.load(tiny, batch_size=4)
    found = predictor.predict(images)
    expected = plain_timm(tiny, [Image.open(path) for path in images])
    assert len(found) == len(images) == 18
    np.testing.assert_allclose(np.stack([one.values for one in found]), expected, atol=1e-6)
    assert predictor.classes == tuple("0123456789")
    for one, row in zip(found, expected, strict=True):
        assert one.label == str(row.argmax())
        assert one.confidence == pytest.approx(row.max(), abs=1e-6)
        assert one.probabilities[one.label] == one.confidence
        best = np.argsort(-row)[:3]
        assert [label for label, _ in one.top(3)] == [str(index) for index in best]
        assert [value for _, value in one.top(3)] == pytest.approx(row[best].tolist(), abs=1e-6)


def test_an_image_may_be_a_path_a_pillow_image_or_an_array(tiny: Path, images: list[Path]) -> None:
    predictor = finetune.load(str(tiny))
    image = Image.open(images[0])
    forms = [images[0], str(images[0]), image, np.asarray(image)]
    singles = [predictor.predict(form) for form in forms]
    together = predictor.predict(forms)
    alone = predictor.predict(form for form in forms[:1])
    assert isinstance(together, list) and isinstance(alone, list)
    for one in [*singles, *together, *alone]:
        np.testing.assert_allclose(one.values, singles[0].values, atol=1e-6)
    assert predictor.predict([]) == []


def test_an_open_image_gives_the_prediction_of_its_file(tiny: Path, tmp_path: Path) -> None:
    """It is turned upright and put on white, and the given image is not changed."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 4), dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels[..., :3]).save(tmp_path / "lying.jpg", exif=exif)
    predictor = finetune.load(tiny)
    for name in ("clear.png", "lying.jpg"):
        image = Image.open(tmp_path / name)
        mode, size = image.mode, image.size
        of_image, of_file = predictor.predict(image), predictor.predict(tmp_path / name)
        np.testing.assert_array_equal(of_image.values, of_file.values)
        expected = plain_timm(tiny, [decode_image(tmp_path / name)])[0]
        np.testing.assert_allclose(of_file.values, expected, atol=1e-6)
        assert (image.mode, image.size) == (mode, size)
        assert name == "clear.png" or image.getexif()[0x0112] == 6


def test_the_temperature_is_applied(tiny: Path, tmp_path: Path, images: list[Path]) -> None:
    warm = copy_model(tiny, tmp_path / "warm", finetune={"temperature": 2.5})
    values = finetune.load(warm).predict(images[0]).values
    opened = [Image.open(images[0])]
    np.testing.assert_allclose(values, plain_timm(warm, opened, 2.5)[0], atol=1e-6)
    assert np.abs(values - plain_timm(warm, opened)[0]).max() > 1e-3


def test_ten_crops_are_averaged_as_torchvision_would(tiny: Path, images: list[Path]) -> None:
    found = finetune.load(tiny, crops=10).predict(images[0]).values
    network = timm.create_model(f"local-dir:{tiny}", pretrained=True).eval()
    data = resolve_model_data_config(network)
    cut = v2.Compose([v2.Resize(35, v2.InterpolationMode.BILINEAR), v2.TenCrop(32)])
    ready = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    normal = v2.Normalize(data["mean"], data["std"])
    crops = torch.stack([normal(ready(crop)) for crop in cut(Image.open(images[0]).convert("RGB"))])
    with torch.inference_mode():
        expected = network(crops).softmax(1).mean(0).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    plain = finetune.load(tiny).predict(images[0]).values
    assert np.abs(found - plain).max() > 5e-4


def test_duplicate_class_names_get_their_index(tiny: Path, tmp_path: Path, images: list[Path]) -> None:
    names = ["crane", "bee", "crane", *"defghij"]
    named = copy_model(tiny, tmp_path / "named", label_names=names)
    predictor = finetune.load(named)
    assert predictor.classes == ("crane (0)", "bee", "crane (2)", *"defghij")
    assert predictor.predict(images[0]).label in predictor.classes


def test_no_class_vanishes_whatever_its_name(tiny: Path, tmp_path: Path, images: list[Path]) -> None:
    named = copy_model(tiny, tmp_path / "named", label_names=["a", "a", "a (1)", *"defghij"])
    prediction = finetune.load(named).predict(images[0])
    assert len(prediction.probabilities) == 10
    assert sum(prediction.probabilities.values()) == pytest.approx(1)


def test_an_unreadable_image_is_named(tiny: Path, tmp_path: Path, images: list[Path]) -> None:
    (tmp_path / "cut.jpg").write_bytes(images[0].read_bytes()[:300])
    predictor = finetune.load(tiny)
    with pytest.raises(DataError, match=r"cut\.jpg.*cannot be read"):
        predictor.predict([images[0], tmp_path / "cut.jpg"])
    with pytest.raises(DataError, match="file not found"):
        predictor.predict(tmp_path / "none.jpg")
    assert predictor.predict(images[0]).label  # the predictor still works


@pytest.mark.parametrize(
    "thing",
    [
        7,
        None,
        [7],
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
    ids=str,
)
def test_a_value_that_is_not_an_image_is_refused(tiny: Path, thing: Any) -> None:
    with pytest.raises(UsageError, match="is not an image"):
        finetune.load(tiny).predict(thing)


def test_bytes_are_named_in_the_error(tiny: Path) -> None:
    for thing in (b"photo.jpg", bytearray(b"x"), memoryview(b"x"), [b"photo.jpg"]):
        with pytest.raises(UsageError, match=r"(bytes|bytearray|memoryview) is not an image"):
            finetune.load(tiny).predict(thing)  # type: ignore[call-overload]


def test_a_folder_is_refused(tiny: Path, image_folder: Path) -> None:
    with pytest.raises(FinetuneError, match="it is a folder"):
        finetune.load(tiny).predict(image_folder)


def test_unusable_models_are_refused(tiny: Path, tmp_path: Path, images: list[Path]) -> None:
    with pytest.raises(UsageError, match=r"^the model no_such_thing: "):
        finetune.load("no_such_thing")
    other = copy_model(tiny, tmp_path / "other", finetune={"sha256": "0" * 64})
    with pytest.raises(FinetuneError, match=r"sha256|digest|damaged"):
        finetune.load(other)
    headless = copy_model(tiny, tmp_path / "headless")
    weights = load_file(headless / "model.safetensors")
    save_file({k: v for k, v in weights.items() if not k.startswith("fc")}, headless / "model.safetensors")
    with pytest.raises(UsageError, match="classifier"):
        finetune.load(headless)
    broken = copy_model(tiny, tmp_path / "broken")
    weights["fc.weight"][:] = 3e38  # finite, but its logits are not
    save_file(weights, broken / "model.safetensors")
    with pytest.raises(UsageError, match="not finite"):
        finetune.load(broken).predict(images[0])


def test_threads_share_a_predictor(tiny: Path, images: list[Path]) -> None:
    predictor = finetune.load(tiny, batch_size=4)
    expected = [one.values for one in predictor.predict(images)]
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: predictor.predict(images), range(8)):
            np.testing.assert_array_equal(np.stack([one.values for one in found]), np.stack(expected))


def test_running_out_of_memory_halves_the_batch(tiny: Path, images: list[Path]) -> None:
    predictor = finetune.load(tiny)
    expected = predictor.predict(images)
    predictor = finetune.load(tiny)
    forward, sizes = predictor.network.forward, []

    def narrow(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        if len(images) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(images)

    predictor.network.forward = narrow  # type: ignore[method-assign]
    found = predictor.predict(images)
    assert max(sizes) > 5 and sizes[-1] <= 5
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.values, two.values, atol=1e-6)


@pytest.mark.slow
def test_importing_finetune_is_cheap_and_load_is_there() -> None:
    code = (
        "import sys, finetune; assert not {'torch', 'numpy', 'PIL'} & sys.modules.keys()\n"
        "from finetune import load, Predictor, Prediction; print(load.__module__)\n"
        "try: finetune.nothing\nexcept AttributeError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [
        "finetune.evaluation.predictor",
        "module 'finetune' has no attribute 'nothing'",
    ]
