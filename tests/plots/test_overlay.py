"""Heat maps drawn over images."""

from __future__ import annotations

import numpy as np
from PIL import Image

from finetune.plots.overlay import draw_overlay, resize_heat


def test_evidence_is_coloured_where_it_is() -> None:
    heat = np.zeros((4, 4), np.float32)
    heat[0, 3] = 1.0  # top right
    image = Image.new("RGB", (80, 40), (120, 120, 120))
    pixels = np.asarray(draw_overlay(image, heat)).astype(int)
    assert pixels.shape == (40, 80, 3)
    assert np.ptp(pixels[5, 75]) > 60  # coloured
    assert (pixels[30:, :30] == 120).all()  # as it was
    resized = resize_heat(heat, (80, 40))
    assert np.unravel_index(resized.argmax(), resized.shape)[0] < 10


def test_more_evidence_is_lighter() -> None:
    """Grey prints and colour-blind readers then show the same order."""
    black = Image.new("RGB", (8, 8))
    light = [
        np.asarray(draw_overlay(black, np.full((2, 2), value, np.float32)).convert("L")).mean()
        for value in (0.1, 0.4, 0.7, 1.0)
    ]
    assert light == sorted(light) and light[-1] > light[0] + 50


def test_without_evidence_the_image_is_grey() -> None:
    pixels = np.asarray(draw_overlay(Image.new("RGB", (8, 8), (200, 30, 30)), np.zeros((3, 3), np.float32)))
    assert (pixels == pixels[..., :1]).all()
