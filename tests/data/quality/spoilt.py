"""Datasets with deliberate problems, for the tests of the quality report."""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (96, 80)


def photo(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """Return soft shapes, which survive compression and resizing as photographs do, unlike noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def put(path: Path, seed: int, size: tuple[int, int] = SIZE, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    photo(seed, size).save(path, **options)
    return path


def build_clean(root: Path, counts: Mapping[str, int]) -> Path:
    """Write images that all differ; ``{"train/ants": 12}`` gives the number per folder."""
    for number, (folder, many) in enumerate(counts.items()):
        for place in range(many):
            put(root / folder / f"{place:03}.jpg", 1000 * number + place, quality=90)
    return root


def spoil(root: Path) -> Path:
    """Return a folder with every problem that a check looks for."""
    training = {"train/ants": 120, "train/bees": 110, "train/wasps": 3}
    build_clean(root, training | {"val/ants": 12, "val/bees": 12, "val/wasp": 2})
    train, val = root / "train", root / "val"
    put(train / "bee_s" / "000.jpg", 90_000)
    put(train / "bee_s" / "001.jpg", 90_001)
    (train / "flies").mkdir()
    (train / "ants" / "empty.jpg").write_bytes(b"")
    cut = (train / "ants" / "000.jpg").read_bytes()
    (train / "ants" / "cut.jpg").write_bytes(cut[: len(cut) // 2])
    (train / "ants" / "page.jpg").write_text("<!DOCTYPE html><title>404</title>")
    put(train / "ants" / "png.png", 90_002).rename(train / "ants" / "disguised.jpg")
    frames = [photo(seed).convert("P") for seed in (90_003, 90_004)]
    frames[0].save(train / "ants" / "moving.gif", save_all=True, append_images=frames[1:])
    photo(90_005).convert("P").save(train / "ants" / "imageNotFound.gif")
    shutil.copy(train / "ants" / "001.jpg", val / "ants" / "copy.jpg")  # across splits
    shutil.copy(train / "ants" / "002.jpg", train / "ants" / "copy.jpg")  # within one
    shutil.copy(train / "ants" / "003.jpg", train / "bees" / "copy.jpg")  # under two labels
    for name in "abcd":
        shutil.copy(train / "bees" / "004.jpg", train / "bees" / f"gone_{name}.jpg")
    photo(1).resize((70, 58)).save(val / "ants" / "smaller.jpg", quality=70)  # near train/ants/001.jpg
    photo(5).resize((120, 100)).save(train / "bees" / "near.jpg", quality=60)  # near train/ants/005.jpg
    Image.new("RGB", SIZE, "teal").save(train / "bees" / "plain.jpg")
    put(train / "bees" / "long.jpg", 90_006, (300, 40))
    put(train / "bees" / "small.jpg", 90_007, (20, 20))
    _write_bomb(train / "bees" / "bomb.png")
    (root / "train" / "loose.jpg").write_bytes(cut)
    (train / "bees" / "notes.txt").write_text("hello")
    return root


def _write_bomb(path: Path) -> None:
    """Write a PNG whose header declares 400 million pixels."""
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = (20_000).to_bytes(4) * 2
    import zlib

    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4)
    path.write_bytes(content)
