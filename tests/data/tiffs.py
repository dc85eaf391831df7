"""TIFF files of any bands and numbers, written byte by byte: Pillow writes only what it reads."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

_KINDS = {"u": 1, "i": 2, "f": 3, "c": 6}


def write_tiff(
    path: Path,
    pixels: NDArray[Any],
    *,
    photometric: int | None = None,
    extra: tuple[int, ...] = (),
    planar: bool = False,
) -> Path:
    """Write (H, W) or (H, W, C) numbers.

    Args:
        path: the file.
        pixels: of any type of NumPy.
        photometric: TIFF's code; by default RGB for three bands or four, else grey.
        extra: TIFF's ``ExtraSamples``.
        planar: store the bands one after the other.
    """
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    height, width, bands = pixels.shape
    code = photometric if photometric is not None else 2 if bands in (3, 4) else 1
    data = (pixels.transpose(2, 0, 1) if planar else pixels).astype(pixels.dtype.newbyteorder("<")).tobytes()
    strips = bands if planar else 1
    size = len(data) // strips
    offsets = tuple(8 + number * size for number in range(strips))
    tags: list[tuple[int, int, tuple[int, ...]]] = [
        (256, 4, (width,)),
        (257, 4, (height,)),
        (258, 3, (8 * pixels.dtype.itemsize,) * bands),
        (259, 3, (1,)),
        (262, 3, (code,)),
        (273, 4, offsets),
        (277, 3, (bands,)),
        (278, 4, (height,)),
        (279, 4, (size,) * strips),
        (284, 3, (2 if planar else 1,)),
        *([(338, 3, extra)] if extra else []),
        (339, 3, (_KINDS[pixels.dtype.kind],) * bands),
    ]
    start = 8 + len(data)
    tail, entries = b"", b""
    after = start + 2 + 12 * len(tags) + 4
    for tag, kind, values in tags:
        content = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
        place = content.ljust(4, b"\0")
        if len(content) > 4:
            place = struct.pack("<I", after + len(tail))
            tail += content
        entries += struct.pack("<HHI", tag, kind, len(values)) + place
    header = struct.pack("<2sHI", b"II", 42, start)
    path.write_bytes(header + data + struct.pack("<H", len(tags)) + entries + bytes(4) + tail)
    return path
