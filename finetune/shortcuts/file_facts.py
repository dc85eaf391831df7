"""What image files say besides their content: how they were saved, their size, camera, brightness, name.

Shape legend: N images, F facts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import ExifTags, Image, JpegImagePlugin

from finetune.data.dataset import PreparedDataset
from finetune.data.decode import BadImageError, open_image
from finetune.data.scan import scan_images
from finetune.shortcuts.permutation import Floats
from finetune.system.device import available_cores
from finetune.system.display import Display

_LUMINANCE_SUM = 3685
"""Sum of the table for luminance of the JPEG standard (ITU-T T.81, K.1), which is quality 50."""
_BASE, _EXIF = ExifTags.Base, ExifTags.IFD.Exif
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class FileFacts:
    """Facts of some images.

    Attributes:
        values: (N, F) by what they are of: ``quality``, ``size``, ``aspect``, ``brightness``, ``exif``,
            ``order``. NaN where a file does not say.
        words: the facts of each image as a reader wants them, N by what they are of.
    """

    values: Mapping[str, Floats]
    words: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class _Header:
    """What the header of one file says; NaN and empty where it says nothing."""

    quality: float = math.nan
    subsampling: float = math.nan
    is_progressive: float = math.nan
    format: str = ""
    tags: Mapping[str, Any] = field(default_factory=dict)


def read_file_facts(dataset: PreparedDataset, display: Display) -> FileFacts:
    """Read the facts of the images of a data set.

    Args:
        dataset: the images, N of them. Arrays have no facts but the order of their names.
        display: shows progress.
    """
    samples = dataset.samples
    scan = scan_images(dataset, display, "reading image files", is_subset=True).scan
    rows = {path: scan.rows[place] for place, path in enumerate(scan.paths)}
    headers = _read_headers([dataset.file(sample) for sample in samples], display)
    sizes = np.full((len(samples), 2), np.nan)
    greys = np.full((len(samples), 2), np.nan)
    for place, sample in enumerate(samples):
        if (row := rows.get(sample.path)) is not None:
            sizes[place] = row["width"], row["height"]
            greys[place] = row["thumbnail"].mean(), row["thumbnail"].std()
    saved = [(one.quality, one.subsampling, one.is_progressive) for one in headers]
    formats = _code([one.format for one in headers])
    order = _rank_names([sample.path for sample in samples])
    values = {
        "quality": np.column_stack([np.array(saved, float).reshape(-1, 3), formats]),
        "size": sizes,
        "aspect": (sizes[:, 0] / sizes[:, 1])[:, None],
        "brightness": greys,
        "exif": _code_tags([one.tags for one in headers]),
        "order": order[:, None],
    }
    words = {
        "quality": [_say_quality(one) for one in headers],
        "size": [f"{width:.0f} x {height:.0f}" for width, height in sizes],
        "aspect": [f"{width / height:.3f} wide" for width, height in sizes],
        "brightness": [f"brightness {mean:.0f}" for mean in greys[:, 0]],
        "exif": [_say_tags(one.tags) for one in headers],
        "order": [f"number {rank + 1:.0f} by name" for rank in order],
    }
    return FileFacts(values, words)


# --- headers -------------------------------------------------------------------------------------


def _read_headers(files: Sequence[Path], display: Display) -> list[_Header]:
    found = []
    with (
        display.track("reading EXIF and JPEG tables", len(files)) as advance,
        ThreadPoolExecutor(available_cores(), thread_name_prefix="headers") as pool,
    ):
        for header in pool.map(_read_header, files):
            found.append(header)
            advance(1, "")
    return found


def _read_header(file: Path) -> _Header:
    try:
        with open_image(file) as (image, _):
            tags = _read_tags(image)
            if not isinstance(image, JpegImagePlugin.JpegImageFile):
                return _Header(format=str(image.format), tags=tags)
            subsampling = float(JpegImagePlugin.get_sampling(image))
            is_progressive = float(bool(image.info.get("progressive")))
            return _Header(_estimate_quality(image), subsampling, is_progressive, "JPEG", tags)
    except BadImageError:  # arrays, and TIFFs of many bands
        return _Header()


def _estimate_quality(image: JpegImagePlugin.JpegImageFile) -> float:
    """Return the quality from 1 to 100 that libjpeg scales its table for luminance by; NaN if unknown."""
    table = image.quantization.get(0)
    if not table:
        return math.nan
    scale = 100 * sum(table) / _LUMINANCE_SUM
    return round((200 - scale) / 2 if scale <= 100 else 5000 / scale, 1)


def _read_tags(image: Image.Image) -> dict[str, Any]:
    """Return EXIF tags by name; none if the block is damaged."""
    found: dict[str, Any] = {}
    with suppress(Exception):  # Pillow's parser raises many kinds; a picture without tags is no fault
        exif = image.getexif()
        inner = exif.get_ifd(_EXIF)
        camera = " ".join(str(exif[tag]).strip("\0 ") for tag in (_BASE.Make, _BASE.Model) if tag in exif)
        found = {
            "number of tags": float(len(exif) + len(inner)),
            "camera": camera,
            "software": str(exif.get(_BASE.Software, "")),
            "orientation": _to_number(exif.get(_BASE.Orientation)),
            "date": _to_days(inner.get(_BASE.DateTimeOriginal, exif.get(_BASE.DateTime))),
            "exposure": _to_number(inner.get(_BASE.ExposureTime)),
            "sensitivity": _to_number(inner.get(_BASE.ISOSpeedRatings)),
            "focal length": _to_number(inner.get(_BASE.FocalLength)),
        }
    return found if found.get("number of tags") else {}


def _to_number(value: Any) -> float:
    with suppress(Exception):
        return float(value)
    return math.nan


def _to_days(value: Any) -> float:
    with suppress(Exception):
        return datetime.strptime(str(value), "%Y:%m:%d %H:%M:%S").replace(tzinfo=UTC).timestamp() / 86400
    return math.nan


# --- columns -------------------------------------------------------------------------------------


def _code(words: Sequence[str]) -> Floats:
    """Return the place of each word among the different ones, (N,); NaN for empty ones."""
    known = {word: float(place) for place, word in enumerate(sorted({word for word in words if word}))}
    return np.array([known.get(word, math.nan) for word in words])


def _code_tags(tags: Sequence[Mapping[str, Any]]) -> Floats:
    """Return the tags of each image as numbers, (N, 8)."""
    numbers = ("number of tags", "orientation", "date", "exposure", "sensitivity", "focal length")
    columns = [np.array([one.get(name, math.nan) for one in tags], float) for name in numbers]
    columns[0] = np.nan_to_num(columns[0])  # no tag at all is a fact as well
    texts = [_code([one.get(name, "") for one in tags]) for name in ("camera", "software")]
    return np.column_stack([*columns, *texts])


def _rank_names(paths: Sequence[str]) -> Floats:
    """Return the place of each file name by the numbers in it, (N,); NaN without a digit.

    Letters are left out, and so are folders: both tend to spell the class.
    """
    keys = [tuple(map(int, _NUMBER.findall(PurePosixPath(path).stem))) for path in paths]
    ranks = {key: float(place) for place, key in enumerate(sorted({key for key in keys if key}))}
    return np.array([ranks.get(key, math.nan) for key in keys])


def _say_quality(header: _Header) -> str:
    return f"quality {header.quality:.0f}" if header.quality == header.quality else header.format or "unknown"


def _say_tags(tags: Mapping[str, Any]) -> str:
    return str(tags.get("camera") or tags.get("software") or ("other EXIF tags" if tags else "no EXIF tags"))
