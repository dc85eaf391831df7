"""Images in full depth and of any number of channels, read, ordered, standardised and augmented."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from finetune.data.channels.bands import (
    check_takes,
    convert_bands,
    find_display_range,
    measure_channels,
    read_bands,
    standardise,
)
from finetune.data.channels.multiband import count_bands
from finetune.data.dataset import Dataset
from finetune.data.decode import BadImageError, decode_image
from finetune.data.discover import discover
from finetune.data.scan import check_images
from finetune.data.split import SplitConfig
from finetune.data.thumbnail import load_thumbnail
from finetune.data.transforms import Normalizer, build_eval_transform, build_train_transform
from finetune.errors import DataError
from finetune.recipe import Augmentation
from finetune.system.display import SilentDisplay
from pretrained.catalog import find_card
from pretrained.preprocessing import Preprocessing, Resize
from tests.data.tiffs import write_tiff


def deep(shape: tuple[int, ...] = (6, 9), seed: int = 0) -> NDArray[np.uint16]:
    return np.random.default_rng(seed).integers(0, 65536, shape, dtype=np.uint16)


def save(path: Path, values: NDArray[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values).save(path)
    return path


def bands(channels: int, **others: Any) -> Preprocessing:
    values: dict[str, Any] = {"mean": (10.0,) * channels, "std": (2.0,) * channels, "img_size": 32}
    return Preprocessing(channels=channels, kind="bands", **(values | others))


# --- the numbers of a file -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("suffix", [".tif", ".npy"])
def test_grey_numbers_stay_as_they_are(tmp_path: Path, kind: Any, suffix: str) -> None:
    values = deep().astype(kind) * kind(1)
    found = read_bands(save(tmp_path / f"x{suffix}", values), 1)
    assert (found.shape, found.dtype) == ((1, 6, 9), np.float32)
    assert np.array_equal(found[0], values.astype(np.float32))


def test_a_png_of_16_bits_keeps_them_and_8_bits_keep_their_own(tmp_path: Path) -> None:
    values = deep()
    assert np.array_equal(read_bands(save(tmp_path / "a.png", values), 1)[0], values)
    small = (values >> 8).astype(np.uint8)
    assert np.allclose(read_bands(save(tmp_path / "b.png", small), 1)[0], small, atol=1e-4)
    assert np.array_equal(read_bands(tmp_path / "b.png", 3), np.stack([small] * 3))


def test_colours_become_grey_as_in_pillow_and_rgb_of_16_bits_keeps_them(tmp_path: Path) -> None:
    colours = deep((6, 9, 3))
    path = write_tiff(tmp_path / "x.tif", colours)
    assert np.array_equal(read_bands(path, 3), colours.transpose(2, 0, 1))
    small = (colours >> 8).astype(np.uint8)
    pillow = np.asarray(Image.fromarray(small).convert("L"))
    assert np.abs(read_bands(save(tmp_path / "x.png", small), 1)[0] - pillow).max() <= 0.51
    assert np.abs(read_bands(path, 1)[0] - colours @ [0.299, 0.587, 0.114]).max() < 0.1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_images_are_upright(tmp_path: Path, orientation: int) -> None:
    """The reference is what an 8-bit image with the same tag becomes."""
    small = np.random.default_rng(1).integers(0, 256, (6, 9), dtype=np.uint8)
    tags = Image.Exif()
    tags[0x0112] = orientation
    Image.fromarray(small.astype(np.uint16)).save(tmp_path / "deep.png", exif=tags)
    Image.fromarray(small).save(tmp_path / "small.png", exif=tags)
    expected = np.asarray(decode_image(tmp_path / "small.png"))[..., 0]
    assert np.array_equal(read_bands(tmp_path / "deep.png", 1)[0], expected)


def test_the_channels_of_an_array_are_its_last_or_its_first_axis(tmp_path: Path) -> None:
    values = deep((6, 9, 4))
    for order in (values, values.transpose(2, 0, 1)):
        found = read_bands(save(tmp_path / "x.npy", order), 4)
        assert np.array_equal(found, values.transpose(2, 0, 1)) and found.flags.c_contiguous
        assert np.array_equal(convert_bands(order, 4), found)


@pytest.mark.parametrize(
    ("values", "channels", "reason"),
    [
        (np.zeros((6, 9, 4)), 5, "6 x 9 x 4 values, and not of 5 channels"),
        (np.zeros((6, 9)), 2, "6 x 9 values, and not of 2 channels"),
        (np.full((6, 9), np.nan), 1, "not finite"),
        (np.zeros(6), 1, "an array of 6 values, which is no image"),
        (np.zeros((6, 9), dtype=complex), 1, "complex"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, values: NDArray[Any], channels: int, reason: str) -> None:
    with pytest.raises(BadImageError, match=reason):
        read_bands(save(tmp_path / "x.npy", values), channels)


def test_an_open_image_is_read_as_its_file_is(tmp_path: Path) -> None:
    """Pillow keeps 8 of 16 bits of an RGB image, and turns nothing."""
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.fromarray(deep()).save(tmp_path / "turned.png", exif=tags)
    write_tiff(tmp_path / "rgb.tif", deep((6, 9, 3)))
    for name, channels in (("turned.png", 1), ("rgb.tif", 3), ("rgb.tif", 1)):
        expected = read_bands(tmp_path / name, channels)
        with Image.open(tmp_path / name) as image:
            assert np.array_equal(convert_bands(image, channels), expected)
    assert np.array_equal(convert_bands(Image.fromarray(deep()), 1)[0], deep())
    (tmp_path / "cut.png").write_bytes((tmp_path / "turned.png").read_bytes()[:80])
    with Image.open(tmp_path / "cut.png") as image, pytest.raises(BadImageError):
        convert_bands(image, 1)
    with pytest.raises(BadImageError, match="empty"):
        convert_bands(np.zeros((0, 0)), 1)


def test_a_long_thin_array_is_refused_as_an_image_is(tmp_path: Path) -> None:
    with pytest.raises(BadImageError, match="500 times"):
        read_bands(save(tmp_path / "x.npy", np.zeros((1, 600), dtype=np.uint8)), 1)


def test_an_image_file_has_no_five_channels(tmp_path: Path) -> None:
    with pytest.raises(BadImageError, match="no TIFF that can be read"):
        read_bands(save(tmp_path / "x.png", deep()), 5)


# --- mean and deviation --------------------------------------------------------------------------


def folder_of(root: Path, channels: int = 4) -> Dataset:
    for split, number in {"train": 5, "val": 2}.items():
        for label in "ab":
            for index in range(number):
                far = 1_000 * (split == "val")
                save(root / split / label / f"{index}.npy", deep((6, 9, channels), index) + far)
    return discover(root, SplitConfig(0.25, 0))


def test_mean_and_deviation_are_those_of_the_training_pixels(tmp_path: Path) -> None:
    dataset = folder_of(tmp_path)
    view = measure_channels(bands(4, mean=(), std=()), dataset, SilentDisplay())
    pixels = np.concatenate(
        [np.load(dataset.file(sample)).reshape(-1, 4) for sample in dataset.of("train")]
    ).astype(np.float64)
    assert view.mean == pytest.approx(pixels.mean(axis=0)) and view.std == pytest.approx(pixels.std(axis=0))
    assert measure_channels(view, dataset, SilentDisplay()) is view  # known already
    photographs = Preprocessing()
    assert measure_channels(photographs, dataset, SilentDisplay()) is photographs
    shown = find_display_range(view)
    assert shown is not None and shown[0] < np.mean(view.mean) < shown[1]


def test_a_constant_channel_has_deviation_one_and_hopeless_numbers_are_refused(tmp_path: Path) -> None:
    for label, value in (("a", 3.0), ("b", 3.0)):
        for index in range(4):
            save(tmp_path / "same" / label / f"{index}.npy", np.full((4, 5), value))
            save(tmp_path / "huge" / label / f"{index}.npy", deep((4, 5), index) * 1e30)
    view = measure_channels(
        bands(1, mean=(), std=()), discover(tmp_path / "same", SplitConfig(0.25, 0)), SilentDisplay()
    )
    assert (view.mean, view.std) == ((3.0,), (1.0,))
    huge = discover(tmp_path / "huge", SplitConfig(0.25, 0))
    with pytest.raises(DataError, match="Scale the numbers"):
        measure_channels(bands(1, mean=(), std=()), huge, SilentDisplay())


def test_a_folder_that_mixes_depths_is_refused(tmp_path: Path) -> None:
    for label in "ab":
        for index in range(4):
            values = deep((6, 9), index)
            save(tmp_path / label / f"{index}.png", values if index else (values >> 8).astype(np.uint8))
    dataset = discover(tmp_path, SplitConfig(0.25, 0), draws=False)
    with pytest.raises(DataError, match="some have 8 bits and others more"):
        measure_channels(bands(1, mean=(), std=()), dataset, SilentDisplay())


def test_a_value_that_is_given_stays_and_the_other_is_measured(tmp_path: Path) -> None:
    dataset = folder_of(tmp_path)
    both = measure_channels(bands(4, mean=(), std=()), dataset, SilentDisplay())
    given = (1.0, 2.0, 3.0, 4.0)
    assert measure_channels(bands(4, std=given, mean=()), dataset, SilentDisplay()).std == given
    found = measure_channels(bands(4, mean=given, std=()), dataset, SilentDisplay())
    assert (found.mean, found.std) == (given, both.std)


@pytest.mark.parametrize(("value", "size"), [(24.4, (45, 56)), (1.97, (41, 53)), (0.2, (34, 48))])
def test_rounding_is_no_deviation(tmp_path: Path, value: float, size: tuple[int, int]) -> None:
    """The mean of the squares less the square of the mean is 3e-9 to 4e-7 here, and not 0."""
    for label in "ab":
        for index in range(6):
            save(tmp_path / label / f"{index}.npy", np.full(size, value, dtype=np.float32))
    dataset = discover(tmp_path, SplitConfig(0.25, 0), draws=False)
    view = measure_channels(bands(1, mean=(), std=()), dataset, SilentDisplay())
    assert view.std == (1.0,) and view.mean == pytest.approx((value,))


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    dataset = folder_of(tmp_path)
    with pytest.raises(DataError, match="not of 7 channels"):
        measure_channels(bands(7, mean=(), std=()), dataset, SilentDisplay())
    with pytest.raises(DataError, match="takes images of 7 channels"):
        check_takes(find_card("test_vit").with_input(bands(7)), dataset)
    check_takes(find_card("test_vit").with_input(bands(4)), dataset)


# --- views ---------------------------------------------------------------------------------------


def test_the_view_is_the_standardised_image(tmp_path: Path) -> None:
    values = deep((32, 32, 5))
    transform = build_eval_transform(bands(5, crop_pct=1.0))
    view = transform(transform.open(save(tmp_path / "x.npy", values)))
    expected = (values.transpose(2, 0, 1).astype(np.float32) - 10) / 2
    assert (view.dtype, view.is_contiguous()) == (torch.float32, True)
    assert np.array_equal(view.numpy(), expected)
    assert Normalizer(bands(5), torch.device("cpu"))(view[None]).equal(view[None])


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize("augmentation", ["none", "shift", "light", "medium", "heavy"])
def test_views_have_the_shape_of_those_of_photographs(
    tmp_path: Path, resize: Resize, augmentation: Augmentation
) -> None:
    """The geometry is the same: a bright square in grey is where it is in RGB."""
    values = np.zeros((60, 100), dtype=np.uint16)
    values[20:40, 40:70] = 60_000
    path = save(tmp_path / "x.png", values)
    small = Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    view = bands(1, mean=(0.0,), std=(60_000.0,), img_size=(32, 48), resize=resize, crop_pct=1.0)
    rgb = Preprocessing(img_size=(32, 48), resize=resize, crop_pct=1.0, interpolation=view.interpolation)
    transform = build_train_transform(view, augmentation)
    torch.manual_seed(3)
    found = transform(transform.open(path))
    assert found.shape == (1, 32, 48) and found.dtype == torch.float32
    if augmentation in ("none", "shift", "light"):
        other = build_train_transform(rgb, augmentation)
        torch.manual_seed(3)
        expected = other(small)[0] > 127
        assert (found[0] > 0.5).logical_xor(expected).float().mean() < 0.03


def test_standardising_is_by_channel() -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    view = bands(3, mean=(1.0, 2.0, 3.0), std=(1.0, 2.0, 4.0))
    expected = np.stack([(values[c] - (c + 1)) / 2**c for c in range(3)])
    assert np.array_equal(standardise(values, view), expected)


# --- TIFFs of many bands -------------------------------------------------------------------------


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [2, 4, 5, 13])
def test_a_tiff_gives_as_many_channels_as_bands(
    tmp_path: Path, planar: bool, kind: Any, channels: int
) -> None:
    values = (deep((6, 9, channels)) >> 8).astype(kind)
    path = write_tiff(tmp_path / "x.tif", values, planar=planar, photometric=1)
    assert np.array_equal(read_bands(path, channels), values.transpose(2, 0, 1))
    assert count_bands(path) == channels
    with pytest.raises(BadImageError, match=f"6 x 9 x {channels} values, and not of 7 channels"):
        read_bands(path, 7)


@pytest.mark.parametrize(
    ("kind", "planar", "photometric"), [("u2", False, 1), ("u2", True, 2), ("f4", False, 2)]
)
def test_three_bands_that_pillow_does_not_read_are_read(
    tmp_path: Path, kind: str, planar: bool, photometric: int
) -> None:
    values = deep((6, 9, 3)).astype(kind)
    path = write_tiff(tmp_path / "x.tif", values, planar=planar, photometric=photometric)
    with pytest.raises(BadImageError):
        decode_image(path)
    assert np.array_equal(read_bands(path, 3), values.transpose(2, 0, 1))
    assert isinstance(load_thumbnail(path, 18), Image.Image)


def test_a_compressed_tiff_is_read_or_the_package_is_named(tmp_path: Path) -> None:
    import tifffile

    values = deep((6, 9, 5))
    tifffile.imwrite(tmp_path / "x.tif", values, compression="zlib", planarconfig="contig")
    assert np.array_equal(read_bands(tmp_path / "x.tif", 5), values.transpose(2, 0, 1))
    content = bytearray((tmp_path / "x.tif").read_bytes())
    place = content.find(b"\x03\x01\x03\x00\x01\x00\x00\x00")  # tag 259 with one short
    content[place + 8 : place + 10] = (5).to_bytes(2, "little")  # LZW
    (tmp_path / "y.tif").write_bytes(content)
    with pytest.raises(BadImageError, match="imagecodecs"):
        read_bands(tmp_path / "y.tif", 5)


@pytest.mark.parametrize("cut", [0, 4, 8, 40, 200, -1])
def test_a_damaged_tiff_of_many_bands_is_refused(tmp_path: Path, cut: int) -> None:
    path = write_tiff(tmp_path / "x.tif", deep((6, 9, 5)), photometric=1)
    path.write_bytes(path.read_bytes()[:cut] if cut >= 0 else b"II*\0" + bytes(range(256)) * 4)
    with pytest.raises(BadImageError):
        read_bands(path, 5)
    with pytest.raises(BadImageError, match="no TIFF that can be read"):
        read_bands(save(tmp_path / "x.png", deep()), 5)


def test_a_data_set_of_many_bands_is_scanned_with_its_channels(tmp_path: Path) -> None:
    for label in "ab":
        for index in range(3):
            (tmp_path / label).mkdir(exist_ok=True)
            write_tiff(tmp_path / label / f"{index}.tif", deep((6, 9, 5), index), photometric=1)
    dataset = discover(tmp_path, SplitConfig(0.34, 0))
    plain = check_images(dataset)
    assert len(plain.bad) == 6 and "add --channels 5" in plain.bad[0].reason
    found = check_images(dataset, channels=5)
    assert (found.bad, len(found.digests)) == ((), 6)
    check_takes(find_card("test_vit").with_input(bands(5)), dataset)
    with pytest.raises(DataError, match="takes images of 6 channels"):
        check_takes(find_card("test_vit").with_input(bands(6)), dataset)
    picture = load_thumbnail(tmp_path / "a" / "0.tif", 18)
    assert isinstance(picture, Image.Image) and picture.size == (18, 12)
