"""Bands and formats: what is not read is said by name, and is an unreadable image rather than none."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.data.decode import decode_image, probe_image
from finetune.data.formats import SUFFIXES, UNREAD, is_image_name, readable_formats
from tests.data.images import noise, reason, saved, written
from tests.data.tiffs import write_tiff

RANDOM = np.random.default_rng(0)


def numbers(bands: int, dtype: Any = np.uint8) -> Any:
    return (RANDOM.random((16, 16, bands)) * 200).astype(dtype)


@pytest.mark.parametrize(
    ("bands", "dtype", "options", "wanted"),
    [
        (13, np.uint8, {}, "TIFF with 13 bands of 8-bit numbers"),
        (13, np.uint16, {"planar": True}, "TIFF with 13 bands of 16-bit numbers, one band after the other"),
        (2, np.uint16, {}, "TIFF with 2 bands of 16-bit numbers"),
        (2, np.uint8, {"extra": (0,)}, "TIFF with 2 bands of 8-bit numbers"),
        (4, np.uint8, {"extra": (0,)}, "TIFF with 4 bands of 8-bit numbers"),
        (4, np.uint16, {"extra": (0,)}, "TIFF with 4 bands of 16-bit numbers"),
        (5, np.uint8, {"photometric": 2, "extra": (0, 0)}, "TIFF with 5 bands of 8-bit numbers"),
        (5, np.uint8, {"photometric": 2, "extra": (2, 0)}, "TIFF with 5 bands of 8-bit numbers"),
        (3, np.uint16, {"planar": True}, "TIFF with 3 bands of 16-bit numbers, one band after the other"),
        (3, np.uint8, {"photometric": 1}, "TIFF with 3 bands of 8-bit numbers"),
        (3, np.float32, {}, "TIFF with 3 bands of 32-bit floating-point numbers"),
        (3, np.uint32, {}, "TIFF with 3 bands of 32-bit numbers"),
        (1, np.float64, {}, "TIFF with 1 band of 64-bit floating-point numbers"),
        (1, np.int8, {}, "TIFF with 1 band of 8-bit signed numbers"),
        (1, np.complex64, {}, "TIFF with 1 band of 64-bit complex numbers"),
    ],
)
def test_bands_that_are_not_read_are_named(
    tmp_path: Path, bands: int, dtype: Any, options: dict[str, Any], wanted: str
) -> None:
    said = reason(write_tiff(tmp_path / "x.tif", numbers(bands, dtype), **options))
    assert said.startswith(wanted) and "convert" in said


@pytest.mark.parametrize(
    ("bands", "options"),
    [(1, {}), (3, {}), (3, {"planar": True}), (4, {"extra": (2,)}), (4, {"extra": (1,)})],
)
def test_ordinary_tiffs_are_read(tmp_path: Path, bands: int, options: dict[str, Any]) -> None:
    pixels = numbers(bands)
    if bands == 4:
        pixels[..., 3] = 255
    path = write_tiff(tmp_path / "x.tif", pixels, **options)
    probe_image(path)
    assert np.array_equal(np.asarray(decode_image(path)), np.broadcast_to(pixels[..., :3], (16, 16, 3)))


def test_a_damaged_header_is_still_damage(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "x.tif", numbers(3))
    assert reason(written(path, path.read_bytes()[:-100])).startswith("damaged")


def test_the_imaging_library_writes_nothing_of_its_own(tmp_path: Path) -> None:
    """In a process of its own, since libtiff writes to the file descriptor."""
    content = io.BytesIO()
    noise(64, 64).save(content, "TIFF", compression="tiff_lzw")
    data = bytearray(content.getvalue())
    data[40:4000] = b"\xff" * 3960
    bad, many = tmp_path / "bad.tif", write_tiff(tmp_path / "many.tif", numbers(13), photometric=2)
    written(bad, bytes(data))
    code = (
        "import sys; from pathlib import Path; from finetune.data.decode import *\n"
        "for name in sys.argv[1:]:\n"
        "    try: decode_image(Path(name)); print('read')\n"
        "    except BadImageError as error: print(error.reason)\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(bad), str(many)], capture_output=True, text=True, check=True
    )
    assert told.stderr == "" and told.stdout.splitlines()[0].startswith("damaged")


@pytest.mark.parametrize(
    ("name", "head", "wanted"),
    [
        ("x.heic", b"\0\0\0\x18ftypheic", "a HEIC photograph"),
        ("x.jpg", b"\0\0\0\x18ftypheic", "a HEIC photograph"),  # as phones name it on some ways out
        ("x.jpg", b"\0\0\0\x18ftypmif1", "a HEIC photograph"),
        ("x.jxl", b"\xff\x0a\xfa\x7f", "a JPEG XL image"),
        ("x.jp2", b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 image"),
        ("x.psd", b"8BPS\0\x01", "a Photoshop file"),
        ("x.cr3", b"\0\0\0\x18ftypcrx ", "a camera's raw file"),
        ("x.dcm", bytes(128) + b"DICM\x02\0", "a DICOM image"),
        ("x.dcm", b"\x08\x00\x05\x00CS\x0a\x00ISO_IR 100\x80", "a DICOM image"),
        ("x.npy", b"\x93NUMPY\x01\0", "a NumPy array"),
        (
            "x.tga",
            b"\0\0\x02" + bytes(9) + b"\x10\0\x10\0\x18\0\xff",
            "an image in a format that is not read",
        ),
    ],
)
def test_a_known_format_that_is_not_read_says_what_to_do(
    tmp_path: Path, name: str, head: bytes, wanted: str
) -> None:
    if name.endswith("heic") or b"ftyp" in head:
        assert "HEIF" not in readable_formats() or b"crx" in head
    said = reason(written(tmp_path / name, head + bytes(200)))
    assert said.startswith(wanted) and "convert" in said and "not an image" not in said


def test_a_raw_file_is_not_taken_for_its_preview(tmp_path: Path) -> None:
    preview = write_tiff(tmp_path / "x.tif", numbers(3)).read_bytes()
    assert reason(written(tmp_path / "x.NEF", preview)).startswith("a camera's raw file")


def test_a_page_with_an_image_name_is_still_no_image(tmp_path: Path) -> None:
    for name in ("x.jpg", "x.heic", "x.dcm"):
        assert reason(written(tmp_path / name, b"<!DOCTYPE html><html>")).startswith("not an image")


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    assert reason(written(tmp_path / "x.jpg", pointer)) == "a pointer of git-lfs, not the image itself"


def test_one_list_of_suffixes() -> None:
    assert {".avif", ".jfif", ".pjpeg", ".apng", ".ppm", ".pgm", ".heic", ".dcm"} <= SUFFIXES
    assert not SUFFIXES & {".npy", ".txt", ".csv", ".mov", ""} and ".heic" not in UNREAD
    assert is_image_name("A.JFIF") and not is_image_name("jpg")


@pytest.mark.parametrize("form", ["AVIF", "PPM"])
def test_newly_read_formats(tmp_path: Path, form: str) -> None:
    path = saved(tmp_path / f"x.{form.lower()}", Image.new("RGB", (20, 10), (200, 30, 60)))
    assert probe_image(path).format == form
    assert decode_image(path).size == (20, 10)
