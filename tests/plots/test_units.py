"""Pictures of units: crops, frames, projections and mosaics."""

from __future__ import annotations

import numpy as np
from PIL import Image

from finetune.plots.units import crop, draw_map, draw_mosaic, draw_projection, fit_square, frame


def ramp(width: int, height: int) -> Image.Image:
    pixels = np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3)
    return Image.fromarray(pixels)


def test_a_crop_holds_the_pixels_of_the_box() -> None:
    image = ramp(9, 7)
    assert np.array_equal(crop(image, (1, 2, 4, 8)), np.asarray(image)[1:4, 2:8])


def test_a_square_keeps_the_aspect_ratio() -> None:
    square = np.asarray(fit_square(Image.new("RGB", (20, 10), "#ff0000"), 40))
    is_red = (square == (255, 0, 0)).all(axis=2)
    assert square.shape == (40, 40, 3) and is_red[10:30].all() and not is_red[:10].any()


def test_few_pixels_are_enlarged_without_smoothing() -> None:
    image = Image.fromarray(np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8))
    assert set(np.unique(np.asarray(fit_square(image, 10))[4])) == {0, 255}


def test_a_frame_lies_around_its_box() -> None:
    drawn = np.asarray(frame(Image.new("RGB", (50, 50), "#000000"), (10, 20, 30, 40), 100))
    rows, columns = np.nonzero(drawn.any(axis=2))
    assert (rows.min(), columns.min(), rows.max(), columns.max()) == (19, 39, 60, 80)
    assert not drawn[25:55, 45:75].any()  # the inside stays free


def test_a_projection_is_grey_where_it_is_zero() -> None:
    values = np.zeros((3, 4, 4), np.float32)
    values[0, 0, 0], values[2, 3, 3] = 5, -5
    drawn = np.asarray(draw_projection(values))
    assert drawn[1, 1].tolist() == [128, 128, 128]
    assert drawn[0, 0].tolist() == [255, 128, 128] and drawn[3, 3].tolist() == [128, 128, 0]
    assert np.asarray(draw_projection(np.zeros((3, 2, 2), np.float32))).std() == 0


def test_a_map_goes_from_black_to_bright() -> None:
    drawn = np.asarray(draw_map(np.array([[0, 1], [2, 3]], np.float32), 20)).sum(axis=2)
    assert drawn[5, 5] < drawn[5, 15] < drawn[15, 5] < drawn[15, 15]
    assert np.asarray(draw_map(np.ones((2, 2), np.float32), 4)).max() < 10  # it shows nothing


def test_a_mosaic_goes_row_by_row() -> None:
    images = [Image.new("RGB", (8, 8), colour) for colour in ("#ff0000", "#00ff00", "#0000ff", "#ffffff")]
    mosaic = np.asarray(draw_mosaic(images, 90))
    places = [(10, 10), (10, 40), (10, 70), (40, 10), (40, 40)]
    assert [mosaic[place].tolist() for place in places] == [
        [255, 0, 0],
        [0, 255, 0],
        [0, 0, 255],
        [255, 255, 255],
        [230, 230, 226],
    ]
