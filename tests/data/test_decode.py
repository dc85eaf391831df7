"""Every kind of image is decoded to the right RGB; every kind of damage raises BadImageError."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from finetune.data import decode, limits
from finetune.data.decode import BadImageError, decode_image, probe_image
from finetune.data.formats import READ, readable_formats
from tests.data.images import WRITTEN, encoded, near, noise, palette, pixel, reason, saved, written

# What must be read


@pytest.mark.parametrize(
    "extension", sorted(suffix for suffix, form in READ.items() if form in readable_formats())
)
def test_every_accepted_extension_can_be_read(tmp_path: Path, extension: str) -> None:
    content = encoded(Image.new("RGB", (20, 10), (200, 30, 60)), READ[extension])
    path = written(tmp_path / f"x{extension}", content)
    probe_image(path)
    image = decode_image(path)
    assert (image.mode, image.size) == ("RGB", (20, 10))
    assert near(pixel(image, 5, 5), (200, 30, 60))


def test_the_content_counts_not_the_extension(tmp_path: Path) -> None:
    path = written(tmp_path / "x.png", encoded(Image.new("RGB", (4, 4), (9, 9, 9)), "BMP"))
    assert pixel(decode_image(path), 0, 0) == (9, 9, 9)


def test_multi_image_jpeg_of_a_phone(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    first.save(path, "MPO", save_all=True, append_images=[second])
    probe_image(path)
    assert near(pixel(decode_image(path), 8, 8), (255, 0, 0))


# 40 x 20 pixels with a red left half, as a camera stores it in each of the eight orientations.
CORNERS: dict[int, tuple[tuple[int, int], str]] = {
    1: ((40, 20), "left"),
    2: ((40, 20), "right"),
    3: ((40, 20), "right"),
    4: ((40, 20), "left"),
    5: ((20, 40), "top"),
    6: ((20, 40), "top"),
    7: ((20, 40), "bottom"),
    8: ((20, 40), "bottom"),
}
PLACES = {"left": (3, 10), "right": (36, 10), "top": (10, 3), "bottom": (10, 36)}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", CORNERS)
def test_exif_orientation_is_applied_once(tmp_path: Path, kind: str, orientation: int) -> None:
    stored = Image.new("RGB", (40, 20), "blue")
    stored.paste((255, 0, 0), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode_image(written(tmp_path / "x", encoded(stored, kind, exif=exif)))
    size, red = CORNERS[orientation]
    assert image.size == size
    for place in ("left", "right") if size == (40, 20) else ("top", "bottom"):
        assert (pixel(image, *PLACES[place])[0] > 128) == (place == red), place
    assert "exif" not in image.info  # nobody may rotate it again


def test_mirrored_orientations_are_distinguished_from_rotations(tmp_path: Path) -> None:
    stored = Image.new("RGB", (40, 20), "blue")
    stored.paste((255, 0, 0), (0, 0, 8, 8))  # top left corner
    wanted = {1: (3, 3), 2: (36, 3), 3: (36, 16), 4: (3, 16), 5: (3, 3), 6: (16, 3), 7: (16, 36), 8: (3, 36)}
    for orientation, place in wanted.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = decode_image(written(tmp_path / "x", encoded(stored, "PNG", exif=exif)))
        assert pixel(image, *place) == (255, 0, 0), orientation


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"II*\0\x08\0\0\0\xff\xff" + bytes(range(40)), b"no TIFF header at all"])
def test_broken_exif_leaves_the_image_as_it_is(tmp_path: Path, exif: bytes) -> None:
    path = written(tmp_path / "x.jpg", encoded(noise(), "JPEG", exif=b"Exif\0\0" + exif))
    probe_image(path)
    assert decode_image(path).size == (64, 48)


def test_an_image_with_exif_that_pillow_cannot_read_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "x.png", noise())

    def broken(image: Image.Image) -> None:
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr(Image.Image, "getexif", broken)
    assert decode_image(path).size == (64, 48)


def test_the_probe_of_a_jpeg_rebuilds_an_eighth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    load = JpegImageFile.load

    def recorded(image: JpegImageFile) -> Any:
        sizes.append(image.size)
        return load(image)

    monkeypatch.setattr(JpegImageFile, "load", recorded)
    probe_image(saved(tmp_path / "x.jpg", noise(640, 480)))
    assert set(sizes) == {(80, 60)}


def test_16_bit_png_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = [(n * 7919) % 65536 for n in range(64 * 64)]
    grey = Image.frombytes("I;16", (64, 64), struct.pack(f"<{64 * 64}H", *values))
    image = decode_image(saved(tmp_path / "x.png", grey))
    found = image.getchannel("G").tobytes()
    assert abs(sum(found) - sum(values) / 257) / len(values) < 0.05  # the mean survives
    assert all(abs(a - b / 257) <= 0.501 for a, b in zip(found, values, strict=True))


def test_16_bit_ends_are_black_and_white(tmp_path: Path) -> None:
    grey = Image.frombytes("I;16", (2, 1), struct.pack("<2H", 0, 65535))
    image = decode_image(saved(tmp_path / "x.png", grey))
    assert (pixel(image, 0, 0), pixel(image, 1, 0)) == ((0, 0, 0), (255, 255, 255))


def test_big_endian_16_bit_tiff(tmp_path: Path) -> None:
    grey = Image.frombytes("I;16B", (2, 1), struct.pack(">2H", 257, 65535))
    image = decode_image(saved(tmp_path / "x.tif", grey))
    assert (pixel(image, 0, 0)[0], pixel(image, 1, 0)[0]) == (1, 255)


@pytest.mark.parametrize(
    ("mode", "code", "values", "wanted"),
    [
        ("I", "i", (0, 257, 65535), (0, 1, 255)),  # fits 16 bits: divided by 257
        ("I", "i", (257, 514, 1028), (1, 2, 4)),  # dim stays dim
        ("F", "f", (0.0, 0.5, 1.0), (0, 128, 255)),
        ("F", "f", (0.0, 0.1, 0.2), (0, 26, 51)),
    ],
)
def test_wide_greys_are_scaled(
    tmp_path: Path, mode: str, code: str, values: tuple[float, ...], wanted: tuple[int, ...]
) -> None:
    grey = Image.frombytes(mode, (3, 1), struct.pack(f"<3{code}", *values))
    image = decode_image(saved(tmp_path / "x.tif", grey))
    assert tuple(pixel(image, x, 0)[0] for x in range(3)) == wanted


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 1, 5])
def test_a_non_finite_value_is_refused(tmp_path: Path, odd: float, place: int) -> None:
    values = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    values[place] = odd
    path = saved(tmp_path / "x.tif", Image.frombytes("F", (3, 2), struct.pack("<6f", *values)))
    assert reason(path) == "holds non-finite values"


def test_cmyk_jpeg(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)))
    probe_image(path)
    assert near(pixel(decode_image(path), 8, 8), (255, 0, 0))


@pytest.mark.parametrize("mode", ["YCbCr", "LAB"])
def test_other_colour_spaces(tmp_path: Path, mode: str) -> None:
    colour = {"YCbCr": (76, 85, 255), "LAB": (138, 208, 195)}[mode]  # red in both
    image = decode_image(saved(tmp_path / "x.tif", Image.new(mode, (8, 8), colour)))
    red, green, blue = pixel(image, 4, 4)
    assert red > 240 and green < 20 and blue < 20


def test_black_and_white_and_grey(tmp_path: Path) -> None:
    assert pixel(decode_image(saved(tmp_path / "1.png", Image.new("1", (8, 8), 1))), 0, 0) == (255, 255, 255)
    assert pixel(decode_image(saved(tmp_path / "L.png", Image.new("L", (8, 8), 77))), 0, 0) == (77, 77, 77)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_over_white(tmp_path: Path, mode: str) -> None:
    hidden, half = ((10, 10, 10, 0), (0, 0, 0, 128)) if mode == "RGBA" else ((10, 0), (0, 128))
    image = Image.new(mode, (2, 1), hidden)
    image.putpixel((1, 0), half)
    found = decode_image(saved(tmp_path / "x.png", image))
    assert pixel(found, 0, 0) == (255, 255, 255)
    assert near(pixel(found, 1, 0), (127, 127, 127), tolerance=1)


def test_palette(tmp_path: Path) -> None:
    found = decode_image(saved(tmp_path / "x.png", palette()))
    assert (pixel(found, 0, 0), pixel(found, 1, 0)) == ((255, 0, 0), (0, 0, 255))


@pytest.mark.parametrize("extension", ["png", "gif"])
def test_palette_with_a_transparent_colour(tmp_path: Path, extension: str) -> None:
    found = decode_image(saved(tmp_path / f"x.{extension}", palette(), transparency=0))
    assert (pixel(found, 0, 0), pixel(found, 1, 0)) == ((255, 255, 255), (0, 0, 255))


def test_palette_with_an_alpha_for_each_colour(tmp_path: Path) -> None:
    found = decode_image(saved(tmp_path / "x.png", palette(), transparency=bytes([0, 128])))
    assert pixel(found, 0, 0) == (255, 255, 255)
    assert near(pixel(found, 1, 0), (127, 127, 255), tolerance=1)


def test_transparent_key_colour_of_rgb_and_grey(tmp_path: Path) -> None:
    rgb = saved(tmp_path / "rgb.png", Image.new("RGB", (2, 1), (1, 2, 3)), transparency=(1, 2, 3))
    grey = saved(tmp_path / "grey.png", Image.new("L", (2, 1), 7), transparency=7)
    assert pixel(decode_image(rgb), 0, 0) == pixel(decode_image(grey), 0, 0) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_first_frame_of_several(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
    path = written(tmp_path / "x", data)
    probe_image(path)
    assert near(pixel(decode_image(path), 4, 4), (255, 0, 0))


def test_the_result_outlives_its_file_and_travels_between_processes(tmp_path: Path) -> None:
    for kind in WRITTEN:
        path = written(tmp_path / "x", encoded(noise(), kind))
        image = decode_image(path)
        path.unlink()
        assert pickle.loads(pickle.dumps(image)).tobytes() == image.tobytes()
        assert image.resize((2, 2)).size == (2, 2)


# What must be refused (damaged files: tests/faults/test_images.py)


def test_formats_that_are_not_listed_are_never_parsed(tmp_path: Path) -> None:
    path = written(tmp_path / "x.png", encoded(Image.new("RGB", (4, 4)), "PCX"))
    assert reason(path).startswith("not an image (starts with")


def test_the_pixel_limit_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_PIXELS", 64 * 48)
    path = saved(tmp_path / "x.png", noise(64, 48))
    probe_image(path)
    monkeypatch.setattr(limits, "MAX_PIXELS", 64 * 48 - 1)
    assert reason(path) == "64 x 48 pixels, more than 3071 in all"


def test_an_image_like_a_line_is_not_enlarged(tmp_path: Path) -> None:
    assert decode_image(saved(tmp_path / "x.png", Image.new("RGB", (1000, 2))), None).size == (1000, 2)
    for size in ((1001, 2), (1, 60_000)):
        path = saved(tmp_path / "x.png", Image.new("RGB", size))
        assert reason(path).endswith("pixels: one side is more than 500 times the other")


def test_the_byte_limit_is_exact_and_comes_before_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "x.png", noise())
    monkeypatch.setattr(decode, "MAX_BYTES", path.stat().st_size)
    probe_image(path)
    monkeypatch.setattr(decode, "MAX_BYTES", path.stat().st_size - 1)
    monkeypatch.setattr(decode, "_identified", None)
    assert reason(path) == "file of 1 MB, more than 0 MB"


def test_a_file_of_gigabytes_is_refused_at_once(tmp_path: Path) -> None:
    path = written(tmp_path / "x.jpg", b"")
    with path.open("r+b") as file:
        file.truncate(512 * 2**20 + 1)  # takes no room on the disk
    assert reason(path) == "file of 513 MB, more than 512 MB"


def test_an_image_of_200_megapixels_is_too_large_and_not_damaged(tmp_path: Path) -> None:
    """The largest images of phones; 108 megapixels are accepted."""
    data = bytearray(encoded(noise(), "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", 12_240, 16_320)
    assert reason(written(tmp_path / "x.jpg", bytes(data))) == "more than 178956970 pixels"


def test_lack_of_memory_is_not_blamed_on_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "x.png", noise())

    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", exhausted)
    with pytest.raises(MemoryError):
        decode_image(path)


def test_the_error_travels_between_processes() -> None:
    copy = pickle.loads(pickle.dumps(BadImageError("empty file")))
    assert isinstance(copy, BadImageError) and copy.reason == "empty file"
