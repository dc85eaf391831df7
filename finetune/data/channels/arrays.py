"""Arrays of numbers in place of images, for networks whose input is no photograph (the board of AlphaGo).

::

    .npy, .npz -> (C, H, W) float32, the values of the file -> network
                  or (H, W, C), brought into that order

Values are neither resized nor normalised: the planes of a board are zeros and ones. A file is read only after
its header has shown a shape and a type that are taken, so that no header can ask for more memory than that.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image

from finetune.data.dataset import Dataset
from finetune.data.decode import BadImageError, describe_fault
from finetune.data.formats import is_array_name
from finetune.data.limits import MAX_PIXELS, find_size_fault
from finetune.system.regular_files import open_regular

Planes = NDArray[np.float32]
"""(C, H, W)."""
Shape = tuple[int, ...]
_SUFFIX = ".npy"
_AXES = 3
_ZIP = b"PK\x03\x04"
_KINDS = "biuf"
"""Kinds of numpy's types that are numbers: truth values, integers with and without sign, real numbers."""


def read_planes(path: Path, input_size: tuple[int, int, int]) -> Planes:
    """Return the array of a file as a network takes it.

    Args:
        path: path of a ``.npy`` file, or of a ``.npz`` file with a single array.
        input_size: (C, H, W) of the network; a file may also have the order (H, W, C).

    Raises:
        BadImageError: the file is missing, no array, damaged, of another shape, or holds values that are not
            finite numbers.
    """
    return arrange(_read(path, find_orders(input_size)), input_size)


def read_array(path: Path) -> Planes:
    """Return the numbers of a file, of any size and of two or three axes, as float32.

    Raises:
        BadImageError: as :func:`read_planes`, or it is too large.
    """
    shape = read_shape(path)
    if len(shape) not in (_AXES - 1, _AXES) or not 0 < math.prod(shape) <= MAX_PIXELS:
        raise BadImageError(f"an array of {describe_shape(shape)} values, which is no image")
    *_, width, height = sorted(shape)
    if fault := find_size_fault((width, height)):
        raise BadImageError(fault)
    return _read(path, (shape,))


def arrange(values: NDArray[Any], input_size: tuple[int, int, int]) -> Planes:
    """Return numbers (C, H, W) or (H, W, C) as a network takes them: (C, H, W) float32, contiguous.

    Raises:
        BadImageError: they have another shape, or are not finite numbers.
    """
    if values.shape not in find_orders(input_size):
        found, wanted = describe_shape(values.shape), describe_shape(input_size)
        raise BadImageError(f"an array of {found} values, and not of {wanted}")
    finite = to_finite(values)
    return finite if values.shape == input_size else np.ascontiguousarray(finite.transpose(2, 0, 1))


def check_array(path: Path, shape: Shape) -> None:
    """Read an array to its end.

    Raises:
        BadImageError: as :func:`read_planes`.
    """
    _read(path, (shape,))


def read_shape(path: Path) -> Shape:
    """Return the shape of the array in a file, from its header.

    Raises:
        BadImageError: the file is missing, no array, or its header is damaged.
    """
    with _opened(path) as file:
        return _read_header(file)[0]


def find_array_shape(dataset: Dataset) -> Shape | None:
    """Return the shape of a data set's arrays: that of the first one that is readable; None for images."""
    for sample in dataset.samples:
        if not is_array_name(sample.path):
            return None
        with suppress(BadImageError):
            return read_shape(dataset.file(sample))
    return None


def find_orders(input_size: tuple[int, int, int]) -> tuple[Shape, Shape]:
    """Return the two shapes of a file with the input of a network: (C, H, W) and (H, W, C)."""
    return input_size, (*input_size[1:], input_size[0])


def count_channels(shape: Shape) -> tuple[int, ...]:
    """Return the numbers of channels that an array may have: (H, W), (H, W, C) or (C, H, W)."""
    if len(shape) == _AXES - 1:
        return (1,)
    return (shape[2], shape[0]) if len(shape) == _AXES else ()


def describe_shape(shape: Shape) -> str:
    """Return a shape in words, such as ``48 x 19 x 19``."""
    return " x ".join(map(str, shape)) or "no"


def draw_planes(values: NDArray[Any]) -> Image.Image:
    """Return a picture of an array of two or three axes: the mean of its planes, black to white, as RGB.

    The last of three axes is that of the planes if the others have the same length, or it is the shortest;
    else the first is.
    """
    shape = values.shape
    last = len(shape) == _AXES and (shape[0] == shape[1] != shape[2] or shape[2] == min(shape) < shape[0])
    mean = values if len(shape) < _AXES else values.mean(axis=2 if last else 0)
    low, high = float(mean.min()), float(mean.max())
    levels = (mean - low) * (255.0 / (high - low)) if high > low else np.zeros_like(mean)
    return Image.fromarray(np.rint(levels).astype(np.uint8)).convert("RGB")


# --- reading ---------------------------------------------------------------------------------------


def _read(path: Path, shapes: tuple[Shape, ...]) -> Planes:
    with _opened(path) as file:
        shape, is_fortran, kind = _read_header(file)
        _check_numbers(kind)
        if shape not in shapes:
            found, wanted = describe_shape(shape), describe_shape(shapes[0])
            raise BadImageError(f"an array of {found} values, and not of {wanted}")
        content = file.read(math.prod(shape) * kind.itemsize)
    if len(content) < math.prod(shape) * kind.itemsize:
        raise BadImageError("truncated: the end of the array is missing")
    return to_finite(np.frombuffer(content, kind).reshape(shape, order="F" if is_fortran else "C"))


def to_finite(values: NDArray[Any]) -> NDArray[np.float32]:
    """Return a copy in float32, writable and contiguous.

    Raises:
        BadImageError: they are no numbers, or not finite.
    """
    _check_numbers(values.dtype)
    with np.errstate(over="ignore"):  # a number too large for float32 becomes infinite
        found: NDArray[np.float32] = values.astype(np.float32, order="C")
    if not np.isfinite(found).all():
        raise BadImageError("holds values that are not finite")
    return found


def _check_numbers(kind: np.dtype[Any]) -> None:
    if kind.kind not in _KINDS:
        raise BadImageError(f"an array of {kind.name}, and not of numbers")


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Yield the stream of an array in numpy's format, at its start; convert every error into BadImageError.

    A MemoryError passes: it is a fault of the machine, and the array may be good.
    """
    try:
        with open_regular(path) as file:
            head = file.read(npy.MAGIC_LEN)
            file.seek(0)
            if not head.startswith((npy.MAGIC_PREFIX, _ZIP)):
                raise BadImageError("not an array in NumPy's format (.npy, .npz)" if head else "empty file")
            if not head.startswith(_ZIP):
                yield file
                return
            with zipfile.ZipFile(file) as archive, archive.open(_only_member(archive)) as member:
                yield member
    except (BadImageError, MemoryError):
        raise
    except Exception as error:
        raise BadImageError(describe_fault(path, error)) from error


def _only_member(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    """Return the only array of a ``.npz`` file."""
    members = archive.infolist()
    if len(members) != 1:
        names = ", ".join(os.fsdecode(one.filename).removesuffix(_SUFFIX)[:40] for one in members[:3])
        raise BadImageError(f"holds {len(members)} arrays ({names}), and not a single one")
    return members[0]


def _read_header(file: IO[bytes]) -> tuple[Shape, bool, np.dtype[Any]]:
    """Return shape, whether columns come first (Fortran's order), and type; the data follow in the stream."""
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, is_fortran, kind = read(file)
    return tuple(shape), bool(is_fortran), kind
