"""Decode image files to RGB, or report in a few words why that is impossible.

Pillow alone decodes: a flipped byte in a PNG kills the process in torchvision's own decoder, where Pillow
raises. An image is either decoded completely or refused; half an image padded with grey is never returned.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.Image import Transpose

from finetune.data.channels.depth import (
    FULL,
    ValueRange,
    Values,
    find_range,
    is_deep,
    measure_values,
    read_values,
    to_eight_bits,
)
from finetune.data.channels.tiff import read_layout
from finetune.data.formats import HEAD_BYTES, describe_raw, describe_unread, readable_formats
from finetune.data.limits import MAX_PIXELS, OverdueError, TimedFile, find_excess, find_size_fault, png_chunks
from finetune.system.regular_files import open_regular

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # of images under that limit
warnings.filterwarnings("ignore", module=r"PIL\.")  # these name no file; what matters is raised
MAX_BYTES = 512 * 2**20
"""Size of an uncompressed image of ``MAX_PIXELS``. A parser may hold all of a larger file in memory."""

# First bytes that no text file has: a file that starts like this is a damaged image.
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", *_TIFF)

_ORIENTATION = 0x0112  # EXIF tag; 1 (or none) is upright
_UPRIGHT: dict[object, Transpose] = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
_KEEPS_SIZE = {Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM}


class BadImageError(Exception):
    """An image cannot be read; the caller decides what that means for the run.

    Args:
        reason: why, in one short line (``empty file``, ``truncated: ...``).
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode_image(
    path: Path, short_side: int | None = None, value_range: ValueRange | None = None
) -> Image.Image:
    """Return the image as RGB, upright (EXIF rotation applied), first frame of an animation.

    Transparent pixels are laid over white, since the colours under them are undefined.

    Args:
        path: path of the file.
        short_side: number of pixels that the shorter side needs. The image is returned at the smallest of
            1/1, 1/2, 1/4 ... of its size that has them; a JPEG decodes faster at a reduced size
            (``Image.draft``). None returns the full size.
        value_range: the values that become black and white in images of more than 8 bits, as measured on a
            data set (:mod:`finetune.data.channels.depth`). None for that of the file's format: 0 to 65535, or
            0 to 1 for floating-point numbers.

    Raises:
        BadImageError: the file is missing, no image, damaged, cut short, in a format or with bands that are
            not read, over ``MAX_PIXELS``, ``MAX_BYTES`` or a limit of :mod:`finetune.data.limits`, or holds
            values outside of its format's range while ``value_range`` is None.
    """
    with open_image(path) as (image, file):
        if short_side is None:
            return _finished(image, file, value_range)
        factor, shorter = compute_factor(image.size, short_side), min(image.size)
        image.draft("RGB", (short_side, short_side))  # up to 1/8; formats that cannot do nothing
        upright = _finished(image, file, value_range)
        rest = factor // max(1, round(shorter / min(upright.size)))
        return upright.reduce(rest) if rest > 1 else upright


def read_size(path: Path) -> tuple[int, int]:
    """Return width and height in pixels from the header, before any EXIF rotation.

    Raises:
        BadImageError: as ``decode_image``, for faults that the header shows.
    """
    with open_image(path) as (image, _):
        return image.size


def read_spread(path: Path) -> Values | None:
    """Return the spread of an image's values, or None for an image of 8 bits, which is not decoded.

    Raises:
        BadImageError: as ``decode_image``.
    """
    with open_image(path) as (image, file):
        return _measure(file) if is_deep(image) else None


def _measure(file: BinaryIO) -> Values:
    """Return the spread of the values of an image of more than 8 bits; the file's position stays."""
    here = file.tell()
    with _again(file) as whole:
        values = measure_values(_check_finite(read_values(whole, file)))
    file.seek(here)
    return values


def _check_finite(pixels: NDArray[Any]) -> NDArray[Any]:
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise BadImageError("holds non-finite values")
    return pixels


def compute_factor(size: tuple[int, int], short_side: int) -> int:
    """Return the largest power of two that divides the shorter side into ``short_side`` pixels or more."""
    return 1 << max(0, (min(size) // short_side).bit_length() - 1)


@dataclass(frozen=True, slots=True)
class Probe:
    """Facts about an image, from decoding it once.

    Attributes:
        format: one of :data:`finetune.data.formats.FORMATS`; phones' multi-picture JPEGs are JPEG.
        mode: Pillow's name for the pixel format in the file (``RGB``, ``L``, ``P`` ...).
        width: in pixels, upright.
        height: in pixels, upright.
        is_animated: whether it has more than one frame or page.
        grey: the image in grey, upright, squashed to ``PROBE_SIDE`` by ``PROBE_SIDE`` pixels; that of an
            image of more than 8 bits has the image's own range.
        values: spread of the values of an image of more than 8 bits; None for others.
    """

    format: str
    mode: str
    width: int
    height: int
    is_animated: bool
    grey: Image.Image
    values: Values | None = None


PROBE_SIDE = 32
"""Pixels of the sides of a probe's grey image."""


def probe_image(path: Path) -> Probe:
    """Decode all the data as cheaply as possible; ``decode_image`` accepts every image that this accepts.

    It may need the range of values of the data set for those of more than 8 bits.

    A JPEG is entropy-decoded to its end, but reconstructed in grey at down to an eighth of its size: this
    detects a truncated file at a fraction of the cost. Other formats are decoded in full.

    Raises:
        BadImageError: as ``decode_image``.
    """
    with open_image(path) as (image, file):
        is_jpeg = image.format in {"JPEG", "MPO"}
        mode, (width, height) = image.mode, image.size
        values = _measure(file) if is_deep(image) else None
        if is_jpeg:
            # Reduced, it has a whole number of pixels, of which the last may be half outside the image.
            image.draft("L", (PROBE_SIDE, PROBE_SIDE))
            scale = max(1, round(min(width, height) / min(image.size)))
            image.load()
            grey = _squash(image.convert("L"), (width / scale, height / scale))
        else:
            own = None if values is None else find_range([values])
            upright = _finished(image, file, own).convert("L")
            grey = _squash(upright, upright.size)
        # Read after the pixels: a PNG reads them to find the tag, and would hide their faults.
        turn = find_turn(image)
        if is_jpeg and turn is not None:
            grey = grey.transpose(turn)
        if turn is not None and turn not in _KEEPS_SIZE:
            width, height = height, width
        is_animated = not is_jpeg and _is_animated(image)
        form = "JPEG" if is_jpeg else str(image.format)
        return Probe(form, mode, width, height, is_animated, grey, values)


def _squash(grey: Image.Image, size: tuple[float, float]) -> Image.Image:
    """Resize the upper left part of an image, of the given size, to a square of ``PROBE_SIDE`` pixels."""
    box = (0, 0, min(size[0], grey.width), min(size[1], grey.height))
    return grey.resize((PROBE_SIDE, PROBE_SIDE), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def _is_animated(image: Image.Image) -> bool:
    """Return whether there is a second frame; a damaged one does not count, since only the first is used."""
    try:
        return bool(getattr(image, "is_animated", False))
    except MemoryError:
        raise
    except Exception:
        return False


def convert_image(image: Image.Image, value_range: ValueRange | None = None) -> Image.Image:
    """Return a copy of an open image as ``decode_image`` returns a file: RGB, upright, over white.

    Raises:
        BadImageError: it is damaged, cut short, over ``MAX_PIXELS``, or holds values whose range is unknown.
    """
    try:
        if fault := find_size_fault(image.size):
            raise BadImageError(fault)
        return _finished(image.copy(), None, value_range)
    except (BadImageError, MemoryError):
        raise
    except Exception as error:
        raise BadImageError(describe_fault(Path(), error)) from error


@contextmanager
def open_image(path: Path) -> Iterator[tuple[Image.Image, BinaryIO]]:
    """Yield the image with its header read, and its file; convert every error into BadImageError.

    A MemoryError passes: it is a fault of the machine, and the image may be good.
    """
    try:
        with open_regular(path) as opened, TimedFile(opened) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise BadImageError(f"file of {-(-size // 2**20)} MB, more than {MAX_BYTES // 2**20} MB")
            yield _identified(file, path.name), file
    except (BadImageError, MemoryError):
        raise
    except Exception as error:
        raise BadImageError(describe_fault(path, error)) from error


def _identified(file: BinaryIO, name: str) -> Image.Image:
    """Open the image from its header; refuse files that are empty, of unknown format or too large."""
    head = file.read(HEAD_BYTES)
    if not head:
        raise BadImageError("empty file")
    if head.startswith(_TIFF) and (raw := describe_raw(name)):
        raise BadImageError(raw)
    if excess := find_excess(file, head):
        raise BadImageError(excess)
    refusal = _refuse_bands(file) if head.startswith(_TIFF) else None
    file.seek(0)
    try:
        image = Image.open(file, formats=readable_formats())
    except UnidentifiedImageError:
        raise BadImageError(refusal or _unidentified(head, name)) from None
    except Image.DecompressionBombError:  # Pillow's own limit, the same number; the file is not damaged
        raise BadImageError(f"more than {MAX_PIXELS} pixels") from None
    if fault := find_size_fault(image.size):
        raise BadImageError(fault)
    if image.format == "PNG":
        _require_end(file)
    return image


def _refuse_bands(file: BinaryIO) -> str | None:
    """Refuse a TIFF of which Pillow would drop bands; return what to say where Pillow cannot read it."""
    file.seek(0)
    layout = read_layout(file)
    if layout is not None and layout.fault:
        raise BadImageError(layout.fault)
    return None if layout is None else layout.refusal


def _require_end(file: BinaryIO) -> None:
    """Refuse a PNG without its last chunk: Pillow accepts it if all rows happen to be complete."""
    here = file.tell()
    *_, last = png_chunks(file)
    if not last.endswith(b"IEND") or len(file.read(4)) < 4:
        raise BadImageError("truncated: the end of the file is missing")
    file.seek(here)


def _unidentified(head: bytes, name: str) -> str:
    """Describe a file that is not read: by its format, or by its first word, unprintable bytes escaped."""
    if known := describe_unread(name, head):
        return known
    if head.startswith(_MAGIC):
        return "damaged: starts like an image, but its header cannot be read"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of git-lfs, not the image itself"
    word = (head[:16].split() or [head[:16]])[0]
    return f'not an image (starts with "{repr(word)[2:-1]}")'


def describe_fault(path: Path, error: Exception) -> str:
    """Return in one short line what went wrong."""
    if isinstance(error, FileNotFoundError):
        return "link to a file that does not exist" if path.is_symlink() else "file not found"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, OverdueError):
        return str(error)
    message = " ".join(str(error).split())[:120] or type(error).__name__
    cut_short = isinstance(error, EOFError) or "truncated" in message.lower()
    return f"{'truncated' if cut_short else 'damaged'}: {message}"


def _finished(image: Image.Image, file: BinaryIO | None, value_range: ValueRange | None) -> Image.Image:
    """Decode the pixels, make them RGB and turn them upright."""
    is_wide = file is not None and is_deep(image) and image.mode in ("RGB", "RGBA", "LA")
    image.load()
    turn = find_turn(image)
    if is_wide and file is not None and value_range not in (None, FULL):
        image = _wide_rgb(image, file, value_range)
    else:
        image = _rgb(image, value_range)
    if turn is not None:
        image = image.transpose(turn)
    image.info = {}  # otherwise a later step may find the orientation tag and rotate again
    return image


def _wide_rgb(image: Image.Image, file: BinaryIO, value_range: ValueRange) -> Image.Image:
    """Return an image with 16 bits in each of several channels, of which Pillow keeps the upper 8, as RGB."""
    alpha = image.getchannel("A") if "A" in image.getbands() else None
    with _again(file) as whole:
        rgb = to_eight_bits(read_values(whole, file), value_range).convert("RGB")
    if alpha is None:
        return rgb
    rgb.putalpha(alpha)
    return _over_white(rgb)


@contextmanager
def _again(file: BinaryIO) -> Iterator[Image.Image]:
    """Yield the image of a file with its pixels not loaded yet."""
    file.seek(0)
    with Image.open(file, formats=readable_formats()) as image:
        yield image


def find_turn(image: Image.Image) -> Transpose | None:
    """Return what brings an image with loaded pixels upright (EXIF orientation), None for nothing.

    Broken metadata count as none: the pixels may still be good.
    """
    try:
        return find_upright(image.getexif().get(_ORIENTATION))
    except MemoryError:
        raise
    except Exception:
        return None


def find_upright(orientation: object) -> Transpose | None:
    """Return what brings an image with an EXIF orientation, 1 to 8, upright; None for nothing."""
    return _UPRIGHT.get(orientation)


def _rgb(image: Image.Image, value_range: ValueRange | None) -> Image.Image:
    """Return decoded pixels of any mode as RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        pixels = _check_finite(np.asarray(image))
        return to_eight_bits(pixels, value_range or _format_range(pixels)).convert("RGB")
    if image.has_transparency_data:
        return _over_white(image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    """Return RGBA pixels laid over white."""
    page = Image.new("RGB", image.size, "white")
    page.paste(image, mask=image.getchannel("A"))
    return page


def _format_range(pixels: NDArray[Any]) -> ValueRange:
    """Return the range of values of a file's format; refuse values outside of it, whose white is unknown."""
    full = (0.0, 1.0) if pixels.dtype.kind == "f" else FULL
    low, high = float(pixels.min()), float(pixels.max())
    if full[0] <= low and high <= full[1]:
        return full
    raise BadImageError(f"holds values from {low:g} to {high:g}, and the model knows no range for them")
