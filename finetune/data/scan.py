"""Decode every image once before training: broken files are listed at the start and do not crash a run later.

Training may continue without a few unreadable images. Validation and test may not: nobody would see that a
metric was computed over fewer images.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.channels.arrays import check_array, find_array_shape
from finetune.data.channels.bands import GREY, read_bands
from finetune.data.channels.depth import ValueRange, Values, find_range
from finetune.data.dataset import BadImage, Dataset, Sample
from finetune.data.decode import BadImageError, probe_image, read_spread
from finetune.data.scan_cache import ROW, ScanCache, ScanResult, build_row, read_values
from finetune.errors import DataError
from finetune.system.device import available_cores
from finetune.system.display import Display
from finetune.system.regular_files import open_regular
from pretrained.preprocessing import IMAGE_CHANNELS

_SHOWN = 5
_ALLOWED_PERCENT = 1  # of the training images
_CHUNK = 4096  # tasks queued at a time: a million at once would need gigabytes
# Pillow releases Python's lock while it decodes, so threads use several cores.
_THREADS = min(16, available_cores())


@dataclass(frozen=True)
class CheckedImages:
    """The result of scanning every image.

    Attributes:
        bad: images that cannot be decoded, in the order of the dataset.
        digests: SHA-256 of every file that could be read, by path.
        scan: one row of facts per decoded image; empty if the files were only read, or are arrays.
        values: spread of the values of each image of more than 8 bits, by path.
    """

    bad: tuple[BadImage, ...]
    digests: dict[str, str]
    scan: ScanResult = field(default_factory=ScanResult)
    values: dict[str, Values] = field(default_factory=dict)

    def find_value_range(self, dataset: Dataset) -> ValueRange | None:
        """Return the range of values of the training images; None if none has more than 8 bits."""
        paths = [sample.path for sample in dataset.of("train")]
        return find_range(self.values[path] for path in paths if path in self.values)


@dataclass(frozen=True, slots=True)
class _ScannedImage:
    """A readable image: its digest, the spread of its values and, if it was decoded, its row."""

    digest: str
    values: Values | None
    row: NDArray[np.void] | None


def scan_images(
    dataset: Dataset,
    display: Display,
    message: str,
    *,
    decode: bool = True,
    is_subset: bool = False,
    channels: int = IMAGE_CHANNELS,
) -> CheckedImages:
    """Read and decode every image once, with a progress bar; an unchanged file is not read again.

    Args:
        dataset: the images, of all splits.
        display: progress display.
        message: label of the progress bar.
        decode: false only reads the files, for their digests.
        is_subset: whether the dataset has other images, whose cached results are kept.
        channels: number of channels that the images are read with.
    """
    store = ScanCache(dataset.root, keep_others=is_subset or not dataset.is_folder)
    with display.track(message, len(dataset.samples)) as advance:
        return check_images(dataset, lambda _: advance(1, ""), decode=decode, store=store, channels=channels)


def check_images(
    dataset: Dataset,
    on_progress: Callable[[int], None] | None = None,
    threads: int = _THREADS,
    decode: bool = True,
    store: ScanCache | None = None,
    channels: int = IMAGE_CHANNELS,
) -> CheckedImages:
    """Read and decode every image once.

    Args:
        dataset: the images to check, of all splits.
        on_progress: called in this thread after each image with the number checked so far.
        threads: images decoded at the same time, 1 or more.
        decode: false only reads the files, for their digests.
        store: results of earlier scans; an unchanged file is not read again.
        channels: number of channels that the images are read with.

    An interrupt (or an error in ``on_progress``) drops what is queued, and does not wait for the images
    being decoded at that moment.
    """
    bad: list[BadImage] = []
    digests: dict[str, str] = {}
    values: dict[str, Values] = {}
    paths: list[str] = []
    rows = np.zeros(len(dataset.samples) if decode else 0, ROW)
    shape = find_array_shape(dataset)
    look = partial(_scan_image, dataset, decode, store)
    if shape is not None:
        look = partial(_scan_numbers, dataset, partial(check_array, shape=shape))
    elif channels not in (GREY, IMAGE_CHANNELS):
        look = partial(_scan_numbers, dataset, partial(read_bands, channels=channels))
    pool = ThreadPoolExecutor(threads, thread_name_prefix="check-images")
    try:
        for start in range(0, len(dataset.samples), _CHUNK):
            chunk = dataset.samples[start : start + _CHUNK]
            for done, (sample, found) in enumerate(zip(chunk, pool.map(look, chunk), strict=True), start + 1):
                if isinstance(found, BadImage):
                    bad.append(found)
                else:
                    digests[sample.path] = found.digest
                    if found.values is not None:
                        values[sample.path] = found.values
                    if decode and found.row is not None:
                        rows[len(paths)] = found.row
                        paths.append(sample.path)
                if on_progress:
                    on_progress(done)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    scan = ScanResult(tuple(paths), rows[: len(paths)])
    if store is not None and decode:
        store.save(scan)
    return CheckedImages(tuple(bad), digests, scan, values)


def _scan_image(
    dataset: Dataset, decode: bool, store: ScanCache | None, sample: Sample
) -> BadImage | _ScannedImage:
    """Scan one image, or take its row from the cache."""
    path = dataset.file(sample)
    try:
        status = _status(path)
        if store is not None and status is not None:
            row = store.find(sample.path, status)
            if row is not None:
                return _ScannedImage(bytes(row["sha256"]).hex(), read_values(row), row)
        # First: it reports a pipe or a folder with a clear reason.
        probe: Any = probe_image(path) if decode else None
        values = (None if probe is None else probe.values) if decode else _read_spread(path)
        with open_regular(path) as file:
            digest = hashlib.file_digest(file, "sha256")
        row = None if probe is None or status is None else build_row(probe, digest.digest(), status)
        return _ScannedImage(digest.hexdigest(), values, row)
    except BadImageError as error:
        return BadImage(sample.path, sample.split, error.reason)
    except OSError as error:
        return BadImage(sample.path, sample.split, (error.strerror or str(error)).lower())


def _scan_numbers(
    dataset: Dataset, read: Callable[[Path], object], sample: Sample
) -> BadImage | _ScannedImage:
    """Read one file of numbers to its end; it has no row, since the checks are for pictures."""
    path = dataset.file(sample)
    try:
        read(path)
        with open_regular(path) as file:
            return _ScannedImage(hashlib.file_digest(file, "sha256").hexdigest(), None, None)
    except BadImageError as error:
        return BadImage(sample.path, sample.split, error.reason)
    except OSError as error:
        return BadImage(sample.path, sample.split, (error.strerror or str(error)).lower())


def _read_spread(path: Path) -> Values | None:
    """Return the spread of values of an image; None for 8 bits, and for files that cannot be decoded."""
    with suppress(BadImageError):
        return read_spread(path)
    return None


def _status(path: Path) -> os.stat_result | None:
    """Return a file's status, taken before the file is read, so that a change during reading is noticed."""
    with suppress(OSError):
        return path.stat()
    return None


def check_bad(dataset: Dataset, bad: Sequence[BadImage]) -> Dataset:
    """Return the dataset without its unreadable images, with a warning that names them.

    Raises:
        DataError: a validation or test image is among them, they are 1 % of the training images or more,
            or a class would be left without a training image.
    """
    if not bad:
        return dataset
    _refuse_outside_training(dataset, bad)
    _refuse_many(dataset, bad)
    kept = dataset.without({image.path for image in bad})
    _refuse_emptied(dataset, kept, bad)
    warning = f"{_count(bad, 'training image')} cannot be read and will not be trained on: {_one_line(bad)}."
    return replace(kept, warnings=(*kept.warnings, warning))


def _refuse_outside_training(dataset: Dataset, bad: Sequence[BadImage]) -> None:
    evaluated = [image for image in bad if image.split != "train"]
    if evaluated:
        raise DataError(
            f"data in {dataset.root}",
            f"{_count(evaluated, 'validation or test image')} cannot be read:{_lines(evaluated)}",
            "Replace these files, or remove them yourself: leaving them out here would change what the "
            "reported numbers are measured on.",
        )


def _refuse_many(dataset: Dataset, bad: Sequence[BadImage]) -> None:
    total = len(dataset.of("train"))
    if 100 * len(bad) >= _ALLOWED_PERCENT * total:
        raise DataError(
            f"data in {dataset.root}",
            f"{len(bad)} of {total} training images cannot be read:{_lines(bad)}",
            f"Replace or remove these files; fewer than {_ALLOWED_PERCENT} % are left out with a warning.",
        )


def refuse_many_lost(lost: Mapping[str, str], num_train: int) -> None:
    """Refuse to continue training if too many images have become unreadable.

    Args:
        lost: the reason for each image that can no longer be read, by path.
        num_train: number of images that training began with.

    Raises:
        DataError: 1 % of the training images or more are lost.
    """
    if 100 * len(lost) >= _ALLOWED_PERCENT * num_train:
        bad = [BadImage(path, "train", reason) for path, reason in lost.items()]
        raise DataError(
            "training",
            f"{len(bad)} of {num_train} training images cannot be read any more:{_lines(bad)}",
            f"Restore these files and start the same command again; fewer than {_ALLOWED_PERCENT} % are "
            "left out with a warning.",
        )


def _refuse_emptied(before: Dataset, after: Dataset, bad: Sequence[BadImage]) -> None:
    empty = [name for name, left in zip(after.classes, after.counts("train"), strict=True) if left == 0]
    if empty:
        labels = {sample.path: before.classes[sample.label] for sample in before.of("train")}
        raise DataError(
            f"data in {before.root}",
            f"class {empty[0]!r} has no training image that can be read:"
            f"{_lines([image for image in bad if labels[image.path] == empty[0]])}",
            "Replace these files, or remove the class.",
        )


def _count(bad: Sequence[BadImage], what: str) -> str:
    return f"{len(bad)} {what}{'' if len(bad) == 1 else 's'}"


def _lines(bad: Sequence[BadImage]) -> str:
    """Return the first few as an indented list with reasons, and how many more there are."""
    shown = [f"{image.path} ({image.reason})" for image in bad[:_SHOWN]]
    return "".join(f"\n  {line}" for line in [*shown, *_rest(bad)])


def _one_line(bad: Sequence[BadImage]) -> str:
    return ", ".join([*(f"{image.path} ({image.reason})" for image in bad[:_SHOWN]), *_rest(bad)])


def _rest(bad: Sequence[BadImage]) -> list[str]:
    return [f"and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
