"""Limits on what decoding one image may cost: parts of its file, scans of a JPEG, and computing time.

A scan of a JPEG may take a few bytes, and decodes all pixels once more; a part takes a few bytes, and a
parser in Python looks at it. No camera or program writes nearly as many of them as fit into a small file.
"""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import BinaryIO

MAX_PIXELS = 178_956_970
"""Twice Pillow's own warning level, where Pillow itself would refuse. Compared here, because Pillow's limit
is a global that any library may have switched off, and because warning filters are not thread safe."""
MAX_RATIO = 500
"""Long side of an image over its short one. The short side becomes that of the network's input: an image of
400,000 x 1 pixels would take 60 GB."""
MAX_PARTS = 100_000
"""Chunks of a PNG (one of 512 MB has 65,536 of the usual 8 KB), segments of a JPEG or blocks of a GIF before
its image, strips or tiles of a TIFF."""
MAX_SCANS = 100
"""The most that jpegtran writes; cameras and programs write about 10."""
MAX_SECONDS = 60.0
"""Seconds of computing time to decode an image: several times those of the largest image of a usual kind."""

_CHUNK = 2**20
_SOS, _EOI = 0xDA, 0xD9
_WITHOUT_CONTENT = frozenset({0x00, 0x01, 0xFF, *range(0xD0, 0xDA)})
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_SEQUENTIAL = frozenset({0xC0, 0xC1, 0xC9})
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]", re.DOTALL)


def find_size_fault(size: tuple[int, int]) -> str:
    """Return why an image of this width and height is not decoded; empty if it is."""
    width, height = size
    if width * height > MAX_PIXELS:
        return f"{width} x {height} pixels, more than {MAX_PIXELS} in all"
    if max(size) > MAX_RATIO * min(size):
        return f"{width} x {height} pixels: one side is more than {MAX_RATIO} times the other"
    return ""


class OverdueError(Exception):
    """Decoding took longer than ``MAX_SECONDS``."""


class TimedFile(io.BufferedReader):
    """A file that is no longer read when ``MAX_SECONDS`` of computing time have passed since it was made.

    It bounds every decoder that reads its file part by part, without ending a thread. The time that this
    thread computes counts, and not the time of day: neither a slow disk nor a busy machine decides what can
    be read.

    Args:
        file: open for reading; it stays open, and is not read meanwhile.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(io.FileIO(file.fileno(), closefd=False))
        self._end = time.thread_time() + MAX_SECONDS

    def read(self, size: int | None = -1, /) -> bytes:
        """Read up to ``size`` bytes.

        Raises:
            OverdueError: the time is up.
        """
        if time.thread_time() > self._end:
            raise OverdueError(f"takes more than {MAX_SECONDS:g} s of computing time")
        return super().read(size)


def find_excess(file: BinaryIO, head: bytes) -> str | None:
    """Return which limit the structure of an image file exceeds; None if there is none.

    Args:
        file: the file; its position changes.
        head: its first bytes.
    """
    if head.startswith(b"\xff\xd8"):
        return _find_jpeg_excess(file)
    if head.startswith(b"\x89PNG"):
        return _find_parts_excess(png_chunks(file))
    return _find_parts_excess(_gif_blocks(file)) if head.startswith(b"GIF8") else None


def _find_parts_excess(parts: Iterable[object]) -> str | None:
    number = sum(1 for _ in islice(parts, MAX_PARTS + 1))
    return f"made of more than {MAX_PARTS} parts" if number > MAX_PARTS else None


def png_chunks(file: BinaryIO) -> Iterator[bytes]:
    """Yield length and kind of each chunk of a PNG, up to its end; what comes last may be cut short."""
    file.seek(8)
    while True:
        yield (chunk := file.read(8))
        if len(chunk) < 8 or chunk.endswith(b"IEND"):
            return
        file.seek(int.from_bytes(chunk[:4]) + 4, os.SEEK_CUR)


def _gif_blocks(file: BinaryIO) -> Iterator[None]:
    """Yield for each block of a GIF before its first image, and for each block of comments among them."""
    file.seek(10)
    screen = file.read(3)
    if screen and screen[0] & 0x80:  # with colours
        file.seek(3 << (screen[0] & 7) + 1, os.SEEK_CUR)
    while (kind := file.read(1)) not in (b"", b",", b";"):
        yield
        if kind == b"!":
            file.read(1)
            while (size := file.read(1)) > b"\0":
                yield
                file.seek(size[0], os.SEEK_CUR)


# --- JPEG ---


def _find_jpeg_excess(file: BinaryIO) -> str | None:
    segments = list(islice(_segments(file), MAX_PARTS + 1))
    if fault := _find_parts_excess(segments):
        return fault
    frames = [(marker, start) for marker, start in segments if marker in _FRAMES]
    last, first_scan = segments[-1] if segments else (0, b"")
    if len(frames) == 1 and last == _SOS:
        marker, start = frames[0]
        if marker in _SEQUENTIAL and start[5] == first_scan[0]:  # all bands in one scan: others are not read
            return None
    # The marker of a scan never is within a scan, but may be in other content: then the file is read exactly.
    if _count(file, bytes([0xFF, _SOS])) <= MAX_SCANS:
        return None
    file.seek(0)
    return f"a JPEG of more than {MAX_SCANS} scans" if _has_many_scans(file.read()) else None


def _segments(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield marker and first 6 bytes of each segment of a JPEG up to its first scan; 0 for a byte between."""
    place = 2
    while True:
        file.seek(place)
        start = file.read(10)
        if len(start) < 10:
            return
        if start[0] != 0xFF or start[1] in _WITHOUT_CONTENT:
            yield 0, b""
            place += 1
            continue
        yield start[1], start[4:]
        if start[1] == _SOS:
            return
        place += 2 + int.from_bytes(start[2:4])


def _count(file: BinaryIO, pair: bytes) -> int:
    """Return how often two bytes follow each other in a file."""
    file.seek(0)
    number, last = 0, b""
    while chunk := file.read(_CHUNK):
        number += (last + chunk).count(pair)
        last = chunk[-1:]
    return number


def _has_many_scans(data: bytes) -> bool:
    """Return whether a JPEG has more than ``MAX_SCANS`` scans before its end, or parts than ``MAX_PARTS``.

    What is behind its end (the film of a motion photo) and in its segments (a small picture in the EXIF) does
    not count. In a scan every 0xFF is followed by 0, by the number of a restart, or by the next marker.
    """
    scans, place = 0, 2
    for _ in range(MAX_PARTS):
        found = _MARKER.search(data, place)
        if found is None:
            return False
        marker, place = data[found.end() - 1], found.end()
        if marker == _EOI:
            return False
        scans += marker == _SOS
        if scans > MAX_SCANS:
            return True
        if marker >= 0xC0:  # others are no marker, and libjpeg looks for one right behind them
            place += int.from_bytes(data[place : place + 2])
    return True
