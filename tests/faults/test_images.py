"""Every kind of damage an image file can have: whole and right pixels, or a refusal in a few words.

Half an image padded with grey is the one outcome that nobody would notice, so nothing may end in it.
"""

from __future__ import annotations

import io
import os
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image, ImageFile

from finetune.data.decode import BadImageError, decode_image, probe_image
from tests.data.images import WRITTEN, encoded, near, noise, palette, pixel, reason, saved, written

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


class Case(NamedTuple):
    """A fault: how the file is made, and what must be said of it."""

    name: str
    make: Callable[[Path], object]
    said: str


def flipped(data: bytes, place: float) -> bytes:
    """A PNG with one byte of its pixels turned over, ``place`` of the way through."""
    start = data.index(b"IDAT") + 4
    index = start + int((len(data) - 16 - start) * place)
    return data[:index] + bytes([data[index] ^ 0xFF]) + data[index + 1 :]


def png(width: int, height: int, pixels: bytes) -> bytes:
    """A grey PNG of any size around compressed rows."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def bomb() -> bytes:
    """A sound PNG of a few hundred kilobytes that unpacks to 400 megabytes."""
    packer, rows = zlib.compressobj(), bytes(20_001) * 100
    return png(20_000, 20_000, b"".join(packer.compress(rows) for _ in range(200)) + packer.flush())


def bytes_of(make: Callable[[], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(make())


def cut(kind: str, missing: int | float, **options: Any) -> Callable[[Path], object]:
    """An image that lacks its last bytes (a whole number) or a share of them."""

    def make(path: Path) -> None:
        data = encoded(noise(300, 200), kind, **options)
        path.write_bytes(data[: -(missing if isinstance(missing, int) else int(len(data) * missing))])

    return make


JPEG_KINDS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "full colour": {"subsampling": 0},
    "low quality": {"quality": 30},
}
CASES = (
    *(
        Case(f"{name} JPEG without its last {missing}", cut("JPEG", missing, **options), "truncated: ")
        for name, options in JPEG_KINDS.items()
        for missing in (2, 20, 400, 0.5)
    ),
    *(
        Case(f"{kind} without its last {missing}", cut(kind, missing), "truncated: ")
        for kind in ("PNG", "BMP", "GIF")
        for missing in (20, 0.5)
    ),
    *(Case(f"{kind} cut", cut(kind, missing), "") for kind in ("TIFF", "WEBP") for missing in (20, 0.5)),
    Case("PNG with complete rows and no end", cut("PNG", 12), "truncated: the end of the file is missing"),
    Case("PNG without its last 2", cut("PNG", 2), "truncated: "),
    *(
        Case(
            f"PNG with a byte turned at {place}",
            bytes_of(lambda place=place: flipped(encoded(noise(), "PNG"), place)),  # type: ignore[misc]
            "damaged: ",
        )
        for place in (0.1, 0.5, 0.9)
    ),
    Case("empty", bytes_of(bytes), "empty file"),
    Case(
        "web page",
        bytes_of(lambda: b"<!DOCTYPE html>\n<html>403</html>"),
        'not an image (starts with "<!DOCTYPE")',
    ),
    Case("blanks", bytes_of(lambda: b"   \n  "), "not an image (starts with"),
    Case("HEIC", bytes_of(lambda: b"\0\0\0\x18ftypheic\0\0\0\0"), "a HEIC photograph: convert it"),
    Case("emoji", bytes_of(lambda: b"\xf0\x9f\x90\x9c"), "not an image (starts with"),
    Case("one letter", bytes_of(lambda: b"B"), "not an image (starts with"),
    Case("bomb", bytes_of(bomb), "more than 178956970 pixels"),
    Case("header that promises too much", bytes_of(lambda: png(20_000, 20_000, b"")), "more than 178956970"),
    Case("missing file", lambda path: None, "file not found"),
    Case(
        "dead link",
        lambda path: path.symlink_to(path.with_name("nowhere.jpg")),
        "link to a file that does not exist",
    ),
    Case("link to itself", lambda path: path.symlink_to(path), "too many levels of symbolic links"),
    Case("folder", lambda path: path.mkdir(), "it is a folder"),
    Case("named pipe", os.mkfifo, "it is a named pipe, not a file"),
)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_what_cannot_be_read_is_refused_in_a_few_words(tmp_path: Path, case: Case) -> None:
    path = tmp_path / "x.jpg"
    case.make(path)
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.append(reason(path)), daemon=True)
    thread.start()
    thread.join(timeout=30)  # a pipe would wait for ever
    assert said and said[0].startswith(case.said)
    assert said[0].isascii() and said[0].isprintable()


@pytest.mark.slow
def test_the_bomb_is_a_sound_image_of_a_small_file() -> None:
    """Without the limit it would unpack: the refusal is of its size, and not of some damage."""
    data = bomb()
    assert 300_000 < len(data) < 500_000
    start = data.index(b"IDAT") + 4
    unpacked, packer = 0, zlib.decompressobj()
    rest = data[start:-16]
    while rest:
        unpacked += len(packer.decompress(rest, 2**24))
        rest = packer.unconsumed_tail
    assert unpacked == 20_000 * 20_001 and packer.eof


def test_the_bomb_is_refused_when_another_library_switched_the_guard_of_pillow_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    path = written(tmp_path / "x.png", png(20_000, 20_000, b""))
    assert reason(path) == "20000 x 20000 pixels, more than 178956970 in all"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.png", noise())
    path.chmod(0)
    assert reason(path) == "permission denied"


def test_a_file_that_the_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "x.png", noise())

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refused)  # chmod means nothing to root
    assert reason(path) == "permission denied"


# What looks odd and is whole


def turned(path: Path) -> None:
    """A blue image with a red left half, stored lying on its side."""
    stored = Image.new("RGB", (40, 20), "blue")
    stored.paste(RED, (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    path.write_bytes(encoded(stored, "PNG", exif=exif))


def deep(path: Path) -> None:
    grey = Image.frombytes("I;16", (2, 1), struct.pack("<2H", 25_700, 65_535))
    path.write_bytes(encoded(grey, "PNG"))


def wrong_checksum(path: Path) -> None:
    """Right pixels between wrong checksums: zlib has its own, which is the one that counts."""
    data = bytearray(encoded(palette(), "PNG"))
    data[data.index(b"IEND") - 5] ^= 0xFF
    path.write_bytes(data)


WHOLE: dict[str, tuple[Callable[[Path], object], dict[tuple[int, int], tuple[int, int, int]]]] = {
    "CMYK JPEG": (
        bytes_of(lambda: encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")),
        {(8, 8): RED},
    ),
    "16-bit PNG": (deep, {(0, 0): (100, 100, 100), (1, 0): WHITE}),
    "palette with alpha": (
        bytes_of(lambda: encoded(palette(), "PNG", transparency=bytes([0, 255]))),
        {(0, 0): WHITE, (1, 0): BLUE},
    ),
    "EXIF rotation": (turned, {(10, 3): RED, (10, 36): BLUE}),
    "GIF": (bytes_of(lambda: encoded(palette(), "GIF")), {(0, 0): RED, (1, 0): BLUE}),
    "PNG with a wrong checksum": (wrong_checksum, {(0, 0): RED, (1, 0): BLUE}),
    "PNG called JPEG": (bytes_of(lambda: encoded(palette(), "PNG")), {(0, 0): RED, (1, 0): BLUE}),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_only_looks_odd_is_read_whole_and_right(tmp_path: Path, name: str) -> None:
    make, wanted = WHOLE[name]
    path = tmp_path / "x.jpg"
    make(path)
    probe_image(path)
    image = decode_image(path)
    assert image.mode == "RGB"
    assert not image.info  # no orientation is left for anybody to apply again
    for place, colour in wanted.items():
        assert near(pixel(image, *place), colour), place


# Grey rows


def has_grey_end(image: Image.Image) -> bool:
    """Tell whether the last rows are one flat grey, which noise never is."""
    width, height = image.size
    return len(set(image.crop((0, height - 8, width, height)).tobytes())) == 1


def test_grey_padding_would_be_seen() -> None:
    data = encoded(noise(64, 256), "JPEG")
    parser = Image.open(io.BytesIO(data[: len(data) // 2]))
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        assert has_grey_end(parser.convert("RGB"))
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    assert not has_grey_end(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("kind", WRITTEN)
def test_no_cut_and_no_turned_byte_ends_in_grey(tmp_path: Path, kind: str) -> None:
    """A turned byte of a JPEG may pass, since the format has no checksum; rows may not be missing."""
    data = encoded(noise(64, 256), kind)
    read = 0
    for place in range(40, len(data), max(1, len(data) // 60)):
        turned_byte = data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]
        for damaged in (data[:place], turned_byte):
            try:
                image = decode_image(written(tmp_path / "x", damaged))
            except BadImageError:
                continue
            read += 1
            assert image.size == (64, 256)
            assert not has_grey_end(image), place
    assert read or kind in {"PNG", "GIF", "WEBP"}
