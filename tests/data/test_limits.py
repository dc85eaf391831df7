"""What decoding an image may cost is limited, and images of real programs are far below the limits."""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune.data import decode, limits
from finetune.data.channels import tiff
from finetune.data.decode import decode_image, probe_image
from tests.data.images import WRITTEN, encoded, noise, reason, written

# Scans of a JPEG


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


HEAD = b"\xff\xd8" + segment(0xDB, b"\0" + bytes([1] * 64))
TABLES = segment(0xC4, b"\0\1" + bytes(16)) + segment(0xC4, b"\x10\1" + bytes(15) + b"\x50")
"""A code of one bit for a zero, and one for the end of 32 blocks (and more, as the next five bits say)."""
FIRST = segment(0xDA, b"\1\1\0\0\0\0") + bytes(1)  # the means of the blocks
NEXT = segment(0xDA, b"\1\1\0\1\x3f\0") + bytes(1)  # everything else, of all blocks: nothing


def progressive(scans: int, before: bytes = b"", between: bytes = b"", behind: bytes = b"") -> bytes:
    """A grey JPEG of 16 x 16 pixels in so many scans."""
    size = segment(0xC2, struct.pack(">BHHB3B", 8, 16, 16, 1, 1, 0x11, 0))
    return HEAD + before + size + TABLES + FIRST + between + NEXT * (scans - 1) + b"\xff\xd9" + behind


def in_turns(scans: int) -> bytes:
    """A JPEG that is not progressive, with a scan for each colour, and again."""
    size = segment(0xC0, struct.pack(">BHHB9B", 8, 8, 8, 3, 1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0))
    one = [segment(0xDA, bytes([1, band, 0, 0, 63, 0])) + bytes(1) for band in (1, 2, 3)]
    return HEAD + size + TABLES + b"".join(one[n % 3] for n in range(scans)) + b"\xff\xd9"


@pytest.mark.parametrize("make", [progressive, in_turns])
def test_the_limit_of_scans_is_exact(tmp_path: Path, make: Callable[[int], bytes]) -> None:
    probe_image(written(tmp_path / "x.jpg", make(100)))
    assert reason(written(tmp_path / "x.jpg", make(101))) == "a JPEG of more than 100 scans"


def test_what_is_no_scan_is_not_counted(tmp_path: Path) -> None:
    """The small picture in the EXIF, and the film behind the image of a motion photo."""
    many = b"\xff\xda" * 500
    for data in (
        progressive(10, before=segment(0xE1, b"Exif\0\0" + many)),
        progressive(10, between=segment(0xFE, many)),
        progressive(10, behind=many + progressive(90)),
    ):
        probe_image(written(tmp_path / "x.jpg", data))
        decode_image(tmp_path / "x.jpg")


@pytest.mark.parametrize(
    "between", [b"\xff\x05\xff\xff", b"\xff\xd0\xff\xff", b"\xff\x01\xff\xff", b"\xff\xff\xff", b"\xff\0\xff"]
)
def test_scans_cannot_hide_behind_other_markers(tmp_path: Path, between: bytes) -> None:
    """Nothing but a segment is passed over by its length: libjpeg goes on right behind other markers."""
    data = progressive(101, between=between)
    assert reason(written(tmp_path / "x.jpg", data)) == "a JPEG of more than 100 scans"


def test_files_of_two_thousand_scans_are_refused_at_once(tmp_path: Path) -> None:
    """At 13,000 x 13,000 pixels they take half a minute."""
    began = time.thread_time()
    assert "more than 100 scans" in reason(written(tmp_path / "x.jpg", progressive(2000)))
    assert time.thread_time() - began < 1


def test_a_single_scan_is_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most JPEGs are not read twice."""
    monkeypatch.setattr(limits, "_count", None)
    for options in ({}, {"subsampling": 0}, {"quality": 100}):
        probe_image(written(tmp_path / "x.jpg", encoded(noise(), "JPEG", **options)))
    probe_image(written(tmp_path / "x.jpg", encoded(noise(mode="L"), "JPEG")))


# Parts of a file


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(number: int) -> bytes:
    """A PNG of so many chunks."""
    whole = encoded(Image.new("L", (4, 4)), "PNG")  # three
    return whole[:33] + chunk(b"abCd") * (number - 3) + whole[33:]


def gif(number: int) -> bytes:
    """A GIF with so many blocks before its image."""
    screen = b"GIF89a" + struct.pack("<HHBBB", 2, 2, 0x80, 0, 0) + bytes(6)  # of two colours
    image = b"," + struct.pack("<HHHHB", 0, 0, 2, 2, 0) + b"\2\2\x84\x51\0"
    return screen + b"!\xfe" + b"\1x" * (number - 1) + b"\0" + image + b";"


def jpeg(number: int) -> bytes:
    """A JPEG with so many segments up to its scan."""
    size = segment(0xC0, struct.pack(">BHHB3B", 8, 8, 8, 1, 1, 0x11, 0))
    comments = segment(0xFE, b"") * (number - 5)
    return HEAD + comments + size + TABLES + segment(0xDA, b"\1\1\0\0\x3f\0") + b"\0\xff\xd9"


def strips(number: int) -> bytes:
    """A TIFF of so many strips, a pixel each."""
    after = 8 + 2 + 9 * 12 + 4
    tags = [(256, 1), (257, number), (258, 8), (259, 1), (262, 1), (273, after), (277, 1), (278, 1)]
    entries = [
        struct.pack("<HHII", tag, 4, number if tag in (273, 279) else 1, value)
        for tag, value in [*tags, (279, after + 4 * number)]
    ]
    values = struct.pack("<I", 8) * number + struct.pack("<I", 1) * number
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4) + values


@pytest.mark.parametrize("make", [png, gif, jpeg, strips])
def test_the_limit_of_parts_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[int], bytes]
) -> None:
    for module in (limits, tiff):
        monkeypatch.setattr(module, "MAX_PARTS", 50)
    probe_image(written(tmp_path / "x", make(50)))
    assert "50" in reason(written(tmp_path / "x", make(51)))


@pytest.mark.parametrize("make", [png, gif, jpeg, strips])
def test_a_million_parts_are_refused_at_once(tmp_path: Path, make: Callable[[int], bytes]) -> None:
    path = written(tmp_path / "x", make(500_000))
    began = time.thread_time()
    assert "more than 100000" in reason(path)
    assert time.thread_time() - began < 2


# Time


@pytest.mark.parametrize("kind", WRITTEN)
def test_every_format_is_read_from_a_file_with_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = written(tmp_path / "x", encoded(noise(), kind))
    probe_image(path)
    monkeypatch.setattr(limits, "MAX_SECONDS", -1.0)
    assert reason(path) == "takes more than -1 s of computing time"


def test_a_decoder_in_python_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the largest image it would take a quarter of an hour."""
    path = written(tmp_path / "x.ppm", b"P6 400 400 254\n" + bytes(3 * 400 * 400))
    monkeypatch.setattr(limits, "MAX_SECONDS", 0.05)
    began = time.thread_time()
    assert reason(path) == "takes more than 0.05 s of computing time"
    assert time.thread_time() - began < 0.5


def test_waiting_costs_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that answers slowly, or a process that was stopped for a while, makes no image unreadable."""
    identified = decode._identified

    def slowly(*arguments: Any) -> Image.Image:
        time.sleep(0.3)
        return identified(*arguments)

    monkeypatch.setattr(decode, "_identified", slowly)
    monkeypatch.setattr(limits, "MAX_SECONDS", 0.25)
    probe_image(written(tmp_path / "x.png", encoded(noise(), "PNG")))
