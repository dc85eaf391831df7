"""Small images as files and as bytes, shared by the tests of the decoder."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune.data.decode import BadImageError, decode_image, probe_image
from finetune.data.formats import FORMATS

WRITTEN = tuple(form for form in FORMATS if form != "HEIF")
"""Formats that Pillow writes without another package."""

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
    """Check that both functions refuse a file, with the same reason; return it."""
    with pytest.raises(BadImageError) as probed:
        probe_image(path)
    with pytest.raises(BadImageError) as decoded:
        decode_image(path)
    assert probed.value.reason == decoded.value.reason
    assert "\n" not in probed.value.reason and len(probed.value.reason) < 200
    return probed.value.reason


def palette(size: tuple[int, int] = (2, 1)) -> Image.Image:
    image = Image.new("P", size, 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    return image
