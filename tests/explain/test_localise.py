"""Boxes from saliency, the overlap of boxes, and where a view lies in its image."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from finetune.data.transforms import build_eval_transform
from finetune.evaluation.view_geometry import find_geometry
from finetune.explain.attribution import localise
from finetune.explain.attribution.localise import compute_iou, find_box
from pretrained.preprocessing import ImgSize, Preprocessing, Resize

TRUE = (20.0, 12.0, 44.0, 36.0)


def scene() -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """A red square on green, and a map that is large in a part of the square, and low outside of it."""
    rng = np.random.default_rng(0)
    image = np.full((64, 64, 3), (30, 160, 40), np.uint8)
    image[12:36, 20:44] = (200, 30, 30)
    image = np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
    saliency = rng.random((64, 64)).astype(np.float32) * 0.1
    saliency[12:36, 20:44] += 0.1
    saliency[16:32, 24:40] += rng.random((16, 16)).astype(np.float32) + 0.5
    return saliency, image


@pytest.mark.parametrize(("with_opencv", "least"), [(True, 0.95), (False, 0.3)])
def test_the_box_is_that_of_the_object(
    monkeypatch: pytest.MonkeyPatch, with_opencv: bool, least: float
) -> None:
    """GrabCut finds the whole square from a part of it; a threshold finds the part."""
    assert localise.has_grabcut(), "OpenCV is among the packages for development"
    monkeypatch.setattr(localise, "has_grabcut", lambda: with_opencv)
    saliency, image = scene()
    box = find_box(saliency, image)
    assert box is not None and compute_iou(box, TRUE) > least
    assert find_box(saliency, image) == box, "the random numbers of GrabCut start anew"
    assert find_box(np.zeros_like(saliency), image) is None


def test_a_map_that_is_zero_nearly_everywhere_has_a_box() -> None:
    saliency, image = np.zeros((64, 64), np.float32), scene()[1]
    saliency[20, 30] = 1
    box = find_box(saliency, image)
    assert box is not None and box[0] <= 30 < box[2] and box[1] <= 20 < box[3]


@pytest.mark.parametrize(
    ("second", "share"),
    [
        ((0.0, 0.0, 10.0, 10.0), 1.0),
        ((5.0, 0.0, 15.0, 10.0), 1 / 3),
        ((10.0, 0.0, 20.0, 10.0), 0.0),
        ((20.0, 20.0, 30.0, 30.0), 0.0),
        ((2.0, 2.0, 4.0, 4.0), 0.04),
    ],
)
def test_the_overlap_of_boxes(second: tuple[float, float, float, float], share: float) -> None:
    first = (0.0, 0.0, 10.0, 10.0)
    assert compute_iou(first, second) == compute_iou(second, first) == pytest.approx(share)


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
@pytest.mark.parametrize("size", [(300, 200), (211, 333), (90, 64)])
@pytest.mark.parametrize("img_size", [64, (64, 96)])
def test_a_mark_in_the_view_is_found_in_the_image(
    mode: Resize, size: tuple[int, int], img_size: ImgSize
) -> None:
    """A white rectangle is drawn into the image, and looked for in the view that the network gets."""
    preprocessing = Preprocessing(img_size=img_size, interpolation="bilinear", resize=mode)
    width, height = size
    box = (round(0.4 * width), round(0.35 * height), round(0.6 * width), round(0.7 * height))
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), box)
    view = build_eval_transform(preprocessing)(image)[0].numpy()
    rows, columns = np.nonzero(view > 140)  # the padding of `pad` is 124
    found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    geometry = find_geometry(size, preprocessing)
    assert geometry.to_view(tuple(map(float, box))) == pytest.approx(found, abs=1.01)  # type: ignore[arg-type]
    pixel = max(width, height) / 64 * 1.1
    assert geometry.to_image(tuple(map(float, found))) == pytest.approx(box, abs=pixel)  # type: ignore[arg-type]


def test_what_is_outside_the_view_is_cut_off() -> None:
    geometry = find_geometry((300, 200), Preprocessing(img_size=64, crop_pct=1.0))
    assert geometry.to_view((0, 0, 300, 200)) == (0, 0, 64, 64)
    left, _, right, _ = geometry.to_image((0, 0, 64, 64))
    assert left == pytest.approx(50, abs=3) and right == pytest.approx(250, abs=3)
