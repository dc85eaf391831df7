"""Images at 1/2, 1/4 ... of their size: never smaller than needed, whichever decoder reduces them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from finetune.data.decode import BadImageError, compute_factor, decode_image, read_size
from tests.data.images import encoded, near, noise, pixel, saved, written


@pytest.fixture
def rebuilt(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The sizes at which JPEGs are decoded."""
    sizes: list[tuple[int, int]] = []
    load = JpegImageFile.load

    def recorded(image: JpegImageFile) -> Any:
        sizes.append(image.size)
        return load(image)

    monkeypatch.setattr(JpegImageFile, "load", recorded)
    return sizes


def smooth(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """An image without detail, which every way of reducing leaves nearly the same."""
    return noise(4, 3, mode).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("kind", ["jpg", "png", "tif"])
@pytest.mark.parametrize(
    ("short_side", "factor"),
    [(300, 1), (151, 1), (150, 2), (76, 2), (75, 4), (38, 4), (37, 8), (19, 8), (18, 16), (5, 32)],
)
def test_an_image_is_reduced_as_far_as_allowed_and_no_further(
    tmp_path: Path, rebuilt: list[tuple[int, int]], kind: str, short_side: int, factor: int
) -> None:
    image = decode_image(saved(tmp_path / f"x.{kind}", smooth(401, 300)), short_side)
    assert compute_factor((401, 300), short_side) == factor
    assert image.size == (-(-401 // factor), -(-300 // factor))
    assert min(image.size) >= short_side
    if kind == "jpg":  # its decoder does what it can
        least = min(factor, 8)
        assert rebuilt[0] == (-(-401 // least), -(-300 // least))


def test_without_a_short_side_every_pixel_is_decoded(tmp_path: Path, rebuilt: list[tuple[int, int]]) -> None:
    """As evaluation decodes."""
    path = saved(tmp_path / "x.jpg", noise(400, 300))
    assert decode_image(path).tobytes() == Image.open(path).tobytes()
    assert set(rebuilt) == {(400, 300)}


@pytest.mark.parametrize("kind", ["jpg", "png"])
@pytest.mark.parametrize("short_side", [25, 48, 49, 1000])
def test_an_image_that_is_not_twice_as_large_keeps_every_pixel(
    tmp_path: Path, kind: str, short_side: int
) -> None:
    path = saved(tmp_path / f"x.{kind}", noise(64, 48))
    assert decode_image(path, short_side).tobytes() == decode_image(path).tobytes()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_reduced_jpegs_of_every_mode_show_the_same_as_full_ones(tmp_path: Path, mode: str) -> None:
    path = saved(tmp_path / "x.jpg", smooth(400, 300, mode), quality=95)
    whole = np.asarray(decode_image(path).resize((80, 60), Image.Resampling.BICUBIC), dtype=float)
    reduced = decode_image(path, 60)
    assert (reduced.mode, reduced.size) == ("RGB", (100, 75))
    reduced = reduced.resize((80, 60), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(reduced) - whole).mean() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_jpeg_is_turned_upright(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = written(tmp_path / "x.jpg", encoded(smooth(400, 200), "JPEG", exif=exif))
    whole, reduced = decode_image(path), decode_image(path, 50)
    assert reduced.size == ((100, 50) if orientation < 5 else (50, 100))
    for place in ((0.1, 0.1), (0.9, 0.1), (0.1, 0.9)):
        spots = [(int(place[0] * image.width), int(place[1] * image.height)) for image in (whole, reduced)]
        assert near(pixel(whole, *spots[0]), pixel(reduced, *spots[1]), tolerance=12)


def test_a_truncated_jpeg_is_refused_at_reduced_size_too(tmp_path: Path) -> None:
    path = written(tmp_path / "x.jpg", encoded(noise(400, 300), "JPEG")[:-3000])
    with pytest.raises(BadImageError, match="truncated"):
        decode_image(path, 50)


def test_a_size_is_read_without_decoding(tmp_path: Path, rebuilt: list[tuple[int, int]]) -> None:
    path = saved(tmp_path / "x.jpg", smooth(401, 301))
    assert read_size(path) == (401, 301)
    assert rebuilt == []
    with pytest.raises(BadImageError, match="not found"):
        read_size(tmp_path / "y.jpg")
