"""Images of any number of channels and any depth, with their full range of values.

::

    PNG, TIFF, .npy -> (C, H, W) float32, the numbers of the file -> (x - mean) / std, by channel -> network

Mean and standard deviation of each channel are measured on the training images, once for the whole data set,
and kept with the model. (RGB of 8 bits, :mod:`finetune.data.decode`, is what photographs become.)
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finetune.data.channels.arrays import (
    Planes,
    count_channels,
    describe_shape,
    find_array_shape,
    find_orders,
    read_array,
    to_finite,
)
from finetune.data.channels.depth import ValueRange, is_deep, read_values
from finetune.data.channels.multiband import count_bands, read_tiff, turn_pixels
from finetune.data.dataset import Dataset, Sample
from finetune.data.decode import BadImageError, convert_image, decode_image, find_turn, open_image
from finetune.data.formats import is_array_name
from finetune.data.limits import find_size_fault
from finetune.errors import DataError, count
from finetune.system.device import available_cores
from finetune.system.display import Display
from pretrained.catalog import Card
from pretrained.config import MEANS, STDS
from pretrained.preprocessing import IMAGE_CHANNELS, MOST_CHANNELS, Preprocessing

GREY = 1
"""Channels of a grey image."""
_GREY_WEIGHTS = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""Weights of red, green and blue in a grey value (ITU-R BT.601), as Pillow has them."""
_TRIED = 20
"""Images whose headers are read to find how many bands they have; some may be damaged."""
_MOST_MEASURED = 2_000
"""Images that mean and standard deviation are measured on; a larger data set is sampled evenly."""


def read_bands(path: Path, channels: int) -> Planes:
    """Return an image with the numbers of its file, upright.

    Args:
        path: path of an image, or of an array (H, W, C) or (C, H, W); (H, W) for one channel.
        channels: C. An image gives 1 (grey; colours are weighted as in ITU-R BT.601) or 3 of them, and a TIFF
            as many as it has bands.

    Raises:
        BadImageError: the file cannot be read, or has no such channels.
    """
    if is_array_name(path.name):
        return order_channels(read_array(path), channels)
    if channels not in (GREY, IMAGE_CHANNELS):
        return order_channels(to_finite(read_tiff(path)), channels)
    try:
        return _to_planes(_read_pixels(path), channels)
    except BadImageError:
        if count_bands(path) != channels:
            raise
    return order_channels(to_finite(read_tiff(path)), channels)  # planar, or other numbers than Pillow reads


def check_takes(card: Card, dataset: Dataset) -> None:
    """Refuse a data set of files that a network does not take: images, arrays, or other channels.

    Raises:
        DataError: the data set holds what the network does not take.
    """
    shape, view = find_array_shape(dataset), card.preprocessing
    wanted, is_taken = "images", shape is None
    if view.kind == "array":
        is_taken = shape in find_orders(view.input_size)
        wanted = f"arrays (.npy, .npz) of {describe_shape(view.input_size)} values"
    elif view.kind == "bands":
        is_taken = view.channels in (_find_channels(dataset) if shape is None else count_channels(shape))
        wanted = f"images of {count(view.channels, 'channel')}"
    if is_taken:
        return
    held = "images (grey or RGB)" if shape is None else f"arrays of {describe_shape(shape)} values"
    fix = "Name other data, or take another backbone (see `finetune backbones`)."
    if shape is None and view.kind == "bands":
        fix = "Take --channels grey or 3, or the number of bands of the TIFFs."
    if shape is not None and view.is_rgb:
        fix = f"Add --channels N (up to {MOST_CHANNELS}), the length of the axis of channels, or save PNG."
    raise DataError(f"data in {dataset.root}", f"it holds {held}, and {card.name} takes {wanted}", fix)


def _find_channels(dataset: Dataset) -> tuple[int, ...]:
    """Return the numbers of channels that the images of a data set can give."""
    for sample in dataset.samples[:_TRIED]:
        if bands := count_bands(dataset.file(sample)):
            return (GREY, IMAGE_CHANNELS, bands)
    return (GREY, IMAGE_CHANNELS)


def convert_bands(image: Image.Image | NDArray[Any], channels: int) -> Planes:
    """Return an open image, or an array, as :func:`read_bands` returns a file.

    Raises:
        BadImageError: it has no such channels.
    """
    if isinstance(image, np.ndarray):
        return order_channels(to_finite(image), channels)
    file = Path(getattr(image, "filename", "") or "")
    if file.is_file():  # an open image may have lost the lower bits, and its orientation
        return read_bands(file, channels)
    if image.mode == "F" or image.mode.startswith("I"):
        if fault := find_size_fault(image.size):
            raise BadImageError(fault)
        return _to_planes(np.asarray(image), channels)
    return _to_planes(np.asarray(convert_image(image)), channels)


def order_channels(values: NDArray[Any], channels: int) -> Planes:
    """Return numbers (H, W, C), (C, H, W), or (H, W) of one channel, as (C, H, W).

    Raises:
        BadImageError: they have another number of channels.
    """
    if not values.size:
        raise BadImageError("an empty array")
    if values.ndim == 2 and channels == GREY:
        return values[None]
    if values.ndim == 3 and values.shape[2] == channels:
        return np.ascontiguousarray(values.transpose(2, 0, 1))
    if values.ndim == 3 and values.shape[0] == channels:
        return values
    wanted = count(channels, "channel")
    raise BadImageError(f"{describe_shape(values.shape)} values, and not of {wanted}")


def _read_pixels(path: Path) -> NDArray[Any]:
    """Return the numbers of an image file, (H, W) or (H, W, 3), upright."""
    with open_image(path) as (image, file):
        if is_deep(image):
            pixels = read_values(image, file, over_white=True)
            turn = find_turn(image)
            return turn_pixels(pixels, turn)
    return np.asarray(decode_image(path))


def _to_planes(pixels: NDArray[Any], channels: int) -> Planes:
    """Return numbers (H, W) or (H, W, 3) as grey or as three channels."""
    values = to_finite(pixels)
    if values.ndim == 2:
        values = values[..., None].repeat(channels if channels == IMAGE_CHANNELS else 1, axis=2)
    elif channels == GREY:
        values = (values @ _GREY_WEIGHTS)[..., None]
    return order_channels(values, channels)


def find_display_range(preprocessing: Preprocessing) -> ValueRange | None:
    """Return the values that are shown as black and white: of bands, two deviations around the mean."""
    if preprocessing.kind != "bands" or not preprocessing.mean:
        return preprocessing.value_range
    mean, std = np.mean(preprocessing.mean), np.mean(preprocessing.std)
    return float(mean - 2 * std), float(mean + 2 * std)


def standardise(bands: Planes, preprocessing: Preprocessing) -> Planes:
    """Return (x - mean) / std of each channel, (C, H, W) float32."""
    mean, std = (
        np.array(values, np.float32)[:, None, None] for values in (preprocessing.mean, preprocessing.std)
    )
    standardised: Planes = (bands - mean) / std
    return standardised


def measure_channels(preprocessing: Preprocessing, dataset: Dataset, display: Display) -> Preprocessing:
    """Return preprocessing of bands with the mean and the standard deviation of the training images.

    Each image counts as much as any other. What is known already, and what takes photographs, is returned as
    it is.

    Raises:
        DataError: no training image can be read, some have 8 bits and others more, or their numbers are too
            small or too large.
    """
    if preprocessing.kind != "bands" or (preprocessing.mean and preprocessing.std):
        return preprocessing
    train = dataset.of("train") or dataset.samples
    chosen = train[:: -(-len(train) // _MOST_MEASURED)]
    found, depths = [], set()
    with (
        ThreadPoolExecutor(min(16, available_cores()), thread_name_prefix="measure") as pool,
        display.track("measuring channels", len(chosen)) as advance,
    ):
        for result in pool.map(lambda sample: _measure(dataset, sample, preprocessing.channels), chosen):
            advance(1, "")
            if result is not None:
                found.append(result[0])
                depths.add(result[1])
    if not found:
        asked = f"{preprocessing.channels} channels of the images in {dataset.root}"
        fix = "See `finetune check`, or take another --channels."
        raise DataError(asked, _describe_fault(dataset, chosen, preprocessing.channels), fix)
    if len(depths) > 1:
        said = "some have 8 bits and others more, so that their numbers mean different things"
        fix = "Save all with one depth, or take --channels rgb, which scales them by their formats."
        raise DataError(f"the channels of the images in {dataset.root}", said, fix)
    mean, std = _pool(np.array(found))
    for channel, (middle, deviation) in enumerate(zip(mean, std, strict=True), 1):
        if abs(middle) > MEANS[1] or not STDS[0] <= deviation <= STDS[1]:
            said = f"channel {channel} has the mean {middle:g} and the standard deviation {deviation:g}"
            fix = f"Scale the numbers in the files: deviations of {STDS[0]:g} to {STDS[1]:g} are taken."
            raise DataError(f"the channels of the images in {dataset.root}", said, fix)
    return replace(preprocessing, mean=preprocessing.mean or mean, std=preprocessing.std or std)


def _pool(moments: NDArray[np.float64]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel from those of each image, (N, 2, C) with variances.

    A channel without any difference has the deviation 1.
    """
    mean = moments[:, 0].mean(axis=0)
    variance = moments[:, 1].mean(axis=0) + ((moments[:, 0] - mean) ** 2).mean(axis=0)
    std = np.sqrt(variance)
    std[std == 0] = 1.0  # exact: sums of a float32 number are, in float64
    return tuple(mean.tolist()), tuple(std.tolist())


def _measure(dataset: Dataset, sample: Sample, channels: int) -> tuple[NDArray[np.float64], bool] | None:
    """Return mean and variance of each channel, (2, C), and whether it has more than 8 bits.

    None stands for an image that cannot be read.
    """
    file = dataset.file(sample)
    with suppress(BadImageError):
        bands = read_bands(file, channels).astype(np.float64).reshape(channels, -1)
        moments = np.stack([bands.mean(axis=1), bands.var(axis=1)])
        if is_array_name(file.name) or channels not in (GREY, IMAGE_CHANNELS):
            return moments, True
        with open_image(file) as (image, _):
            return moments, is_deep(image)
    return None


def _describe_fault(dataset: Dataset, samples: Sequence[Sample], channels: int) -> str:
    try:
        read_bands(dataset.file(samples[0]), channels)
    except BadImageError as error:
        return f"{samples[0].path}: {error.reason}"
    return f"{samples[0].path} cannot be read"
