"""Every kind of picture becomes the right RGB, every kind of damage a BadImageError."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from finetune.data import decode
from finetune.data.decode import EXTENSIONS, FORMATS, BadImageError, decode_image, probe_image

Pixel = tuple[int, int, int]


def noise(width: int = 64, height: int = 48, mode: str = "RGB") -> Image.Image:
    size = width * height * len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, (width, height), random.Random(0).randbytes(size))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def pixel(image: Image.Image, x: int, y: int) -> Pixel:
    value = image.getpixel((x, y))
    assert isinstance(value, tuple) and len(value) == 3
    return int(value[0]), int(value[1]), int(value[2])


def near(found: Pixel, wanted: Pixel, tolerance: int = 6) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(found, wanted, strict=True))


def reason(path: Path) -> str:
    """Both doors must refuse, with the same words."""
    with pytest.raises(BadImageError) as probed:
        probe_image(path)
    with pytest.raises(BadImageError) as decoded:
        decode_image(path)
    assert probed.value.reason == decoded.value.reason
    assert "\n" not in probed.value.reason and len(probed.value.reason) < 200
    return probed.value.reason


# What must be read


@pytest.mark.parametrize("extension", sorted(EXTENSIONS))
def test_every_extension_we_accept_can_be_read(tmp_path: Path, extension: str) -> None:
    path = saved(tmp_path / f"x{extension}", Image.new("RGB", (20, 10), (200, 30, 60)))
    probe_image(path)
    image = decode_image(path)
    assert (image.mode, image.size) == ("RGB", (20, 10))
    assert near(pixel(image, 5, 5), (200, 30, 60))


def test_the_content_counts_not_the_extension(tmp_path: Path) -> None:
    path = written(tmp_path / "x.png", encoded(Image.new("RGB", (4, 4), (9, 9, 9)), "BMP"))
    assert pixel(decode_image(path), 0, 0) == (9, 9, 9)


def test_multi_picture_jpeg_of_a_phone(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    first.save(path, "MPO", save_all=True, append_images=[second])
    probe_image(path)
    assert near(pixel(decode_image(path), 8, 8), (255, 0, 0))


# A photograph of 40 x 20 with a red left half, as a camera held in each of the eight ways stores it.
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


def test_mirrored_orientations_are_told_from_rotations(tmp_path: Path) -> None:
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
def test_broken_exif_leaves_the_picture_as_it_is(tmp_path: Path, exif: bytes) -> None:
    path = written(tmp_path / "x.jpg", encoded(noise(), "JPEG", exif=b"Exif\0\0" + exif))
    probe_image(path)
    assert decode_image(path).size == (64, 48)


def test_exif_that_pillow_gives_up_on_is_no_fault_of_the_picture(
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
        ("I", "i", (-100, 0, 100), (0, 128, 255)),  # negative: own minimum to own maximum
        ("I", "i", (0, 500_000, 1_000_000), (0, 128, 255)),
        ("F", "f", (0.0, 0.5, 1.0), (0, 128, 255)),
        ("F", "f", (-3.0, -2.0, 1.0), (0, 64, 255)),
        ("F", "f", (5.0, 5.0, 5.0), (0, 0, 0)),  # no range: black
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
def test_a_value_that_is_no_number_is_refused(tmp_path: Path, odd: float, place: int) -> None:
    values = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    values[place] = odd
    path = saved(tmp_path / "x.tif", Image.frombytes("F", (3, 2), struct.pack("<6f", *values)))
    assert reason(path) == "holds values that are not finite numbers"


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


def palette(size: tuple[int, int] = (2, 1)) -> Image.Image:
    image = Image.new("P", size, 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    return image


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
    for kind in FORMATS:
        path = written(tmp_path / "x", encoded(noise(), kind))
        image = decode_image(path)
        path.unlink()
        assert pickle.loads(pickle.dumps(image)).tobytes() == image.tobytes()
        assert image.resize((2, 2)).size == (2, 2)


# What must be refused


def test_zero_bytes(tmp_path: Path) -> None:
    assert reason(written(tmp_path / "x.jpg", b"")) == "empty file"


def test_a_web_page_named_jpg(tmp_path: Path) -> None:
    page = written(tmp_path / "x.jpg", b"<!DOCTYPE html>\n<html>403</html>")
    assert reason(page) == 'not an image (starts with "<!DOCTYPE")'


@pytest.mark.parametrize(
    "junk", [b"   \n  ", b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00", b"\xf0\x9f\x90\x9c", b"B"]
)
def test_other_junk_is_shown_escaped(tmp_path: Path, junk: bytes) -> None:
    said = reason(written(tmp_path / "x.jpg", junk))
    assert said.startswith("not an image (starts with") and said.isascii() and said.isprintable()


def test_formats_we_do_not_list_are_never_parsed(tmp_path: Path) -> None:
    path = written(tmp_path / "x.png", encoded(Image.new("RGB", (4, 4)), "PPM"))
    assert reason(path) == 'not an image (starts with "P6")'


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("missing", ["half", "20 bytes"])
def test_cut_files(tmp_path: Path, kind: str, missing: str) -> None:
    data = encoded(noise(), kind)
    cut = len(data) // 2 if missing == "half" else 20
    said = reason(written(tmp_path / "x", data[:-cut]))
    if kind in {"JPEG", "PNG", "BMP", "GIF"}:
        assert said.startswith("truncated: ")


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"quality": 30}])
@pytest.mark.parametrize("cut", [2, 20, 400])
def test_cut_jpegs_of_other_kinds(tmp_path: Path, options: dict[str, Any], cut: int) -> None:
    data = encoded(noise(300, 200), "JPEG", **options)
    assert reason(written(tmp_path / "x.jpg", data[:-cut])).startswith("truncated: ")


def test_cut_png_whose_rows_are_complete(tmp_path: Path) -> None:
    data = encoded(noise(), "PNG")
    Image.open(io.BytesIO(data[:-12])).load()  # Pillow sees nothing wrong
    said = reason(written(tmp_path / "x.png", data[:-12]))
    assert said == "truncated: the end of the file is missing"


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_png_with_one_flipped_byte(tmp_path: Path, place: float) -> None:
    data = bytearray(encoded(noise(), "PNG"))
    start = data.index(b"IDAT") + 4
    data[start + int((len(data) - 16 - start) * place)] ^= 0xFF
    assert reason(written(tmp_path / "x.png", bytes(data))).startswith("damaged: ")


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that promises much and holds a few black bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(99)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("limit", [Image.MAX_IMAGE_PIXELS, None])
def test_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # None: another library has switched the guard off
    bomb = written(tmp_path / "x.png", png_header(20_000, 20_000))
    assert bomb.stat().st_size < 200
    assert "pixels" in reason(bomb)


def test_the_pixel_limit_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_PIXELS", 64 * 48)
    path = saved(tmp_path / "x.png", noise(64, 48))
    probe_image(path)
    monkeypatch.setattr(decode, "MAX_PIXELS", 64 * 48 - 1)
    assert reason(path) == "64 x 48 pixels, more than 3071 in all"


def test_directory(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").mkdir()
    assert reason(tmp_path / "x.jpg") == "not a file"


def test_named_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(reason(tmp_path / "x.jpg")), daemon=True)
    thread.start()
    thread.join(timeout=10)
    assert found == ["not a file"]


def test_missing_and_dead_links(tmp_path: Path) -> None:
    (tmp_path / "dead.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    assert reason(tmp_path / "gone.jpg") == "file not found"
    assert reason(tmp_path / "dead.jpg") == "link to a file that does not exist"
    assert "symbolic links" in reason(tmp_path / "loop.jpg")


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "x.png", noise())

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refused)  # chmod means nothing to root
    assert reason(path) == "permission denied"


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


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fuzz_only_bad_image_errors_come_out(tmp_path: Path) -> None:
    """Random bytes, random bytes after a true signature, and true files with a few random bytes."""
    rng = random.Random(2026)
    whole = [encoded(noise(), kind) for kind in FORMATS]
    whole += [
        encoded(palette((9, 9)), "PNG", transparency=bytes([0, 9])),
        encoded(noise(mode="CMYK"), "JPEG"),
    ]
    whole += [encoded(noise().convert("F"), "TIFF"), encoded(noise(), "TIFF", compression="tiff_lzw")]
    refused = 0
    for case in range(200):
        data = bytearray(rng.choice(whole))
        if case % 4 == 0:
            data = bytearray(rng.randbytes(rng.randrange(1, 500)))
        elif case % 4 == 1:
            data[rng.randrange(4, 40) :] = rng.randbytes(300)
        else:
            for _ in range(rng.randrange(1, 9)):
                data[rng.randrange(len(data) if case % 4 == 2 else min(200, len(data)))] = rng.randrange(256)
        path = written(tmp_path / "x", bytes(data))
        outcomes = {outcome(decode_image, path), outcome(probe_image, path)}
        assert len(outcomes) == 1, f"case {case}: {outcomes}"  # what the probe passes, training can read
        refused += outcomes == {"refused"}
    assert 80 < refused < 200  # the fuzz reaches both sides


def outcome(read: Any, path: Path) -> str:
    try:
        read(path)
    except BadImageError:
        return "refused"
    return "read"
