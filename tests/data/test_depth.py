"""Images of more than 8 bits: one range for a data set, the same for every image of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from finetune.data.channels.bands import read_bands
from finetune.data.channels.depth import FULL, Values, find_range, measure_values
from finetune.data.decode import BadImageError, decode_image, probe_image, read_spread
from tests.data.tiffs import write_tiff


def ramp(low: int, high: int, shape: tuple[int, ...] = (64, 64)) -> NDArray[Any]:
    return np.linspace(low, high, int(np.prod(shape))).round().reshape(shape).astype(np.uint16)


def save_png(path: Path, pixels: NDArray[Any]) -> Path:
    Image.fromarray(pixels).save(path)
    return path


def save_wide_png(path: Path, pixels: NDArray[Any]) -> Path:
    """Write (H, W, C) uint16 as a PNG of 16 bits in each of 2, 3 or 4 channels, which Pillow does not."""
    import struct
    import zlib

    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    kind = {2: 4, 3: 2, 4: 6}[channels]

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.parametrize(("bits", "low", "high"), [(10, 0, 1023), (12, 0, 4095), (14, 29_000, 31_000)])
def test_a_sensor_of_few_bits_keeps_its_levels(tmp_path: Path, bits: int, low: int, high: int) -> None:
    path = save_png(tmp_path / "x.png", ramp(low, high))
    spread = read_spread(path)
    assert spread is not None and probe_image(path).values == spread
    found = find_range([spread])
    assert found == (low, high)
    assert len(set(decode_image(path, value_range=found).getchannel("R").tobytes())) == 256
    assert len(set(decode_image(path).getchannel("R").tobytes())) < 65  # with the file's own range


def test_dim_images_stay_dim_beside_bright_ones(tmp_path: Path) -> None:
    dim, bright = save_png(tmp_path / "a.png", ramp(0, 400)), save_png(tmp_path / "b.png", ramp(0, 4000))
    spreads = [spread for spread in map(read_spread, (dim, bright)) if spread is not None]
    found = find_range(spreads)
    levels = [np.asarray(decode_image(path, value_range=found)) for path in (dim, bright)]
    assert levels[0].max() == 26 and levels[1].max() == 255


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("channels", [3, 4])
def test_16_bit_colours_keep_their_low_byte(tmp_path: Path, suffix: str, channels: int) -> None:
    pixels = np.stack([ramp(0, 4095), ramp(4095, 0), ramp(0, 1000)], axis=-1)
    if channels == 4:
        pixels = np.concatenate([pixels, np.full((64, 64, 1), 65535, np.uint16)], axis=-1)
    path = tmp_path / f"x.{suffix}"
    if suffix == "png":
        save_wide_png(path, pixels)
    else:
        write_tiff(path, pixels, photometric=2, extra=(2,) if channels == 4 else ())
    assert read_spread(path) == measure_values(pixels[..., :3])
    found = np.asarray(decode_image(path, value_range=(0.0, 4095.0)))
    assert np.abs(found - pixels[..., :3] / 4095 * 255).max() <= 0.51
    whole = np.asarray(decode_image(path, value_range=FULL))
    assert np.array_equal(whole, pixels[..., :3] >> 8)  # as without a range


def test_16_bit_grey_with_alpha_lies_over_white(tmp_path: Path) -> None:
    pixels = np.stack([ramp(0, 4095), np.full((64, 64), 65535, np.uint16)], axis=-1)
    pixels[0, 0, 1] = 0
    found = np.asarray(decode_image(save_wide_png(tmp_path / "x.png", pixels), value_range=(0.0, 4095.0)))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert np.abs(found[1:, :, 0] - pixels[1:, :, 0] / 4095 * 255).max() <= 0.51


@pytest.mark.parametrize("kind", ["grey png", "png", "tif", "multiplied tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_channels_of_16_bits_lie_over_white_as_those_of_8_do(
    tmp_path: Path, kind: str, channels: int
) -> None:
    """The reference is the same image with 8 bits, laid over white by Pillow's arithmetic."""
    generator = np.random.default_rng(0)
    colours = generator.integers(0, 65536, (8, 9, 1 if kind == "grey png" else 3), dtype=np.uint16)
    opacity = generator.integers(0, 65536, (8, 9, 1), dtype=np.uint16)
    opacity[0, 0], opacity[1, 1] = 0, 65535
    stored = colours
    if kind == "multiplied tif":
        stored = (colours * (opacity / 65535)).round().astype(np.uint16)
    pixels = np.concatenate([stored, opacity], axis=-1)
    if kind.endswith("png"):
        path = save_wide_png(tmp_path / "deep.png", pixels)
    else:
        path = write_tiff(tmp_path / "deep.tif", pixels, extra=(1 if kind == "multiplied tif" else 2,))
    found = read_bands(path, channels)
    assert (found[:, 0, 0] == 65535).all()
    small = np.concatenate([colours.repeat(3 // colours.shape[2], axis=2), opacity], axis=-1) / 257
    Image.fromarray(small.round().astype(np.uint8), "RGBA").save(tmp_path / "small.png")
    expected = read_bands(tmp_path / "small.png", channels) * 257
    assert np.abs(found - expected).max() < 400  # 1.5 levels of 8 bits
    exact = 65535 - (65535 - colours.astype(float)) * (opacity / 65535)
    if channels == 3 or kind == "grey png":
        assert np.abs(found - exact.transpose(2, 0, 1)).max() < 1


def test_colours_that_are_multiplied_by_their_opacity_are_divided_by_it(tmp_path: Path) -> None:
    opacity = np.full((8, 9, 1), 30_000, np.uint16)
    colours = np.random.default_rng(0).integers(0, 65536, (8, 9, 3), dtype=np.uint16)
    stored = (colours * (opacity / 65535)).round().astype(np.uint16)
    path = write_tiff(tmp_path / "x.tif", np.concatenate([stored, opacity], axis=-1), extra=(1,))
    spread = read_spread(path)
    assert spread is not None
    assert (spread.smallest, spread.largest) == pytest.approx((colours.min(), colours.max()), abs=2)


def test_full_16_bits_are_the_same_bits_as_before(tmp_path: Path) -> None:
    path = save_png(tmp_path / "x.png", ramp(0, 65535))
    spread = read_spread(path)
    assert spread is not None and find_range([spread]) == FULL
    assert decode_image(path, value_range=FULL).tobytes() == decode_image(path).tobytes()


def test_8_bits_have_no_range(tmp_path: Path) -> None:
    path = save_png(tmp_path / "x.png", ramp(0, 255).astype(np.uint8))
    assert read_spread(path) is None and probe_image(path).values is None
    assert find_range([]) is None
    assert decode_image(path, value_range=(0.0, 4095.0)).tobytes() == decode_image(path).tobytes()


def test_a_hot_pixel_does_not_take_the_levels(tmp_path: Path) -> None:
    pixels = ramp(0, 1000)
    pixels[3, 3] = 65535
    spread = read_spread(save_png(tmp_path / "x.png", pixels))
    assert spread is not None
    low, high = find_range([spread]) or FULL
    assert 0 <= low <= 2 and 997 <= high <= 1000


@pytest.mark.parametrize(
    ("spreads", "wanted"),
    [
        ([Values(0, 0, 0, 1000)], (0.0, 1000.0)),  # a single bright spot is all there is
        ([Values(7, 7, 7, 7)], (7.0, 8.0)),
        ([Values(-100, 300, -120, 310)], (-120.0, 310.0)),
        ([Values(0, 0.5, 0, 1.0), Values(0.2, 0.9, 0.1, 1.0)], (0.0, 1.0)),
        ([Values(10, 40_000, 0, 65_535)], FULL),
    ],
)
def test_the_range_of_a_data_set(spreads: list[Values], wanted: tuple[float, float]) -> None:
    assert find_range(spreads) == wanted


def test_floats_of_unknown_range_are_refused_and_never_stretched(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "x.tif", np.linspace(0, 300, 64).reshape(8, 8).astype(np.float32))
    with pytest.raises(BadImageError, match="values from 0 to 300"):
        decode_image(path)
    levels = np.asarray(decode_image(path, value_range=(0.0, 600.0)))
    assert levels.max() == 128
