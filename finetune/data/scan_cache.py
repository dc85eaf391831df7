"""Facts about every image from a scan, one row per image, and the file that caches them between scans.

::

    <cache>/looks/<sha256 of the root>.looks
        a line of JSON: format, decoders' versions, number of images, sha256 of what follows
        the paths, UTF-8, separated by zero bytes
        the rows, one per image

A row is valid as long as size, times and inode of the image file are unchanged. A cache file that is
truncated, damaged or written by other versions is ignored. Files that changed a moment ago are not cached: a
second change in the same tick of the clock would go unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import features

from finetune.data.channels.depth import Values
from finetune.data.decode import PROBE_SIDE, Probe
from finetune.data.formats import FORMATS, readable_formats
from finetune.errors import DiskError
from finetune.runs.cache_dir import cache_folder
from finetune.runs.files import write_chunks
from finetune.system.regular_files import open_regular

SIDE = 16
"""Width and height of a thumbnail in pixels."""
SETTLED_SECONDS = 3.0
"""Smallest age of a file's last change for its row to be cached: the coarsest file systems store times in
steps of 2 s."""

ROW = np.dtype(
    [
        ("num_bytes", "<i8"),
        ("mtime_ns", "<i8"),
        ("ctime_ns", "<i8"),
        ("inode", "<u8"),
        ("sha256", "u1", 32),
        ("format", "u1"),
        ("mode", "S8"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("is_animated", "?"),
        ("phash", "<u8"),
        ("thumbnail", "u1", (SIDE, SIDE)),
        ("values", "<f8", 4),
    ]
)
"""The facts about an image: ``format`` is an index into ``FORMATS``; the thumbnail is grey, upright, and
resized to a square; ``values`` are those of ``Values``, NaN for an image of 8 bits."""

_FORMAT = 2
_MOST_HEADER = 2**16


def build_row(probe: Probe, digest: bytes, status: os.stat_result) -> NDArray[np.void]:
    """Return the result of a probe as one row, shape ().

    The perceptual hash is ImageHash's ``phash``: 64 signs of the lowest frequencies of the image, which
    hardly change when the image is resized, recompressed or made grey. Different images differ in about 32 of
    them.

    Args:
        probe: facts from decoding the image.
        digest: SHA-256 of the file, 32 bytes.
        status: status of the file before it was read.
    """
    import imagehash

    row = np.zeros((), ROW)
    row["num_bytes"], row["mtime_ns"], row["ctime_ns"], row["inode"] = stamp(status)
    row["sha256"] = np.frombuffer(digest, np.uint8)
    row["format"], row["mode"] = FORMATS.index(probe.format), probe.mode
    row["width"], row["height"], row["is_animated"] = probe.width, probe.height, probe.is_animated
    bits = imagehash.phash(probe.grey).hash
    row["phash"] = np.packbits(bits.reshape(-1)).view(">u8")[0]
    row["thumbnail"] = np.asarray(probe.grey.reduce(PROBE_SIDE // SIDE))
    row["values"] = np.nan if probe.values is None else astuple(probe.values)
    return row


def read_values(row: NDArray[np.void]) -> Values | None:
    """Return the spread of values of the image of a row, shape (); None for an image of 8 bits."""
    values = row["values"].tolist()
    return None if math.isnan(values[0]) else Values(*values)


def stamp(status: os.stat_result) -> tuple[int, int, int, int]:
    """Return size, times and inode of a file, which change whenever its content does."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


@dataclass(frozen=True, eq=False)
class ScanResult:
    """The rows of the N images that could be decoded.

    Attributes:
        paths: N paths, relative to the root.
        rows: (N,) with dtype ``ROW``, in the order of ``paths``.
    """

    paths: tuple[str, ...] = ()
    rows: NDArray[Any] = field(default_factory=lambda: np.zeros(0, ROW))

    @cached_property
    def index(self) -> Mapping[str, int]:
        """The index of each path's row."""
        return {path: number for number, path in enumerate(self.paths)}

    def __contains__(self, path: str) -> bool:
        return path in self.index

    def __len__(self) -> int:
        return len(self.paths)

    def format_of(self, index: int) -> str:
        """Return Pillow's name of the file's format."""
        return FORMATS[int(self.rows["format"][index])]

    def mode_of(self, index: int) -> str:
        """Return Pillow's name of the file's mode."""
        return bytes(self.rows["mode"][index]).decode()

    def select(self, paths: Iterable[str]) -> ScanResult:
        """Return the rows of the given paths, in their order; paths without a row are left out."""
        chosen = [path for path in paths if path in self]
        return ScanResult(tuple(chosen), self.rows[[self.index[path] for path in chosen]])


def clear_scans() -> tuple[int, int]:
    """Remove the cached scans of all datasets; return the number of files and their size in bytes."""
    number = num_bytes = 0
    for path in _list_scans():
        with suppress(OSError):
            size = path.stat().st_size
            path.unlink()
            number, num_bytes = number + 1, num_bytes + size
    return number, num_bytes


def _list_scans() -> list[Path]:
    try:
        return list(cache_folder("looks").glob("*.looks"))
    except OSError:  # another user's folder
        return []


class ScanCache:
    """The file that caches the rows of one root; a file that cannot be read or written is ignored.

    Args:
        root: the folder that paths are relative to.
        keep_others: keep the rows of images that are not in the scan: another CSV file of the same folder may
            name them.
    """

    def __init__(self, root: Path, keep_others: bool = False) -> None:
        name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:32]
        self.path = cache_folder("looks") / f"{name}.looks"
        self._keep_others = keep_others
        self._known = self._load()
        self._now = time.time()

    def find(self, path: str, status: os.stat_result) -> NDArray[np.void] | None:
        """Return the row of an image, shape (), or None if it is not cached or its file has changed."""
        index = self._known.index.get(path)
        if index is None:
            return None
        row = self._known.rows[index]
        kept = row["num_bytes"], row["mtime_ns"], row["ctime_ns"], row["inode"]
        return row if tuple(map(int, kept)) == stamp(status) else None

    def save(self, scan: ScanResult) -> None:
        """Cache the rows for the next scan, in place of the earlier ones."""
        settled = np.maximum(scan.rows["mtime_ns"], scan.rows["ctime_ns"]) < int(
            (self._now - SETTLED_SECONDS) * 1e9
        )
        paths = [path for path, is_settled in zip(scan.paths, settled.tolist(), strict=True) if is_settled]
        rows = scan.rows[settled]
        if self._keep_others:
            others = [index for path, index in self._known.index.items() if path not in scan]
            paths += [self._known.paths[index] for index in others]
            rows = np.concatenate([rows, self._known.rows[others]])
        if tuple(paths) == self._known.paths and rows.tobytes() == self._known.rows.tobytes():
            return
        with suppress(OSError, DiskError):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_chunks(self.path, _encode(paths, rows))

    def _load(self) -> ScanResult:
        try:
            with open_regular(self.path) as file:
                head = json.loads(file.readline(_MOST_HEADER))
                num_bytes = head["path_bytes"]
                if not 0 <= num_bytes <= os.fstat(file.fileno()).st_size:  # read() allocates it at once
                    return ScanResult()
                names, rows = file.read(num_bytes), file.read()
            if head != _head(names, rows, head["num_images"]):
                return ScanResult()
            paths = tuple(names.decode().split("\0")) if names else ()
            found = ScanResult(paths, np.frombuffer(rows, ROW))
        except (OSError, ValueError, LookupError, TypeError, RecursionError, MemoryError):
            return ScanResult()
        return found if len(found.rows) == len(paths) == head["num_images"] else ScanResult()


def _encode(paths: Sequence[str], rows: NDArray[Any]) -> Iterator[bytes]:
    names, content = "\0".join(paths).encode(), rows.tobytes()
    yield json.dumps(_head(names, content, len(paths))).encode() + b"\n"
    yield names
    yield content


def _head(names: bytes, rows: bytes, num_images: int) -> dict[str, Any]:
    digest = hashlib.sha256(names)
    digest.update(rows)
    codecs = {name: features.version(name) for name in ("jpg", "zlib", "webp", "libtiff", "avif")}
    versions = {name: metadata.version(name) for name in ("pillow", "ImageHash", "scipy")}
    return {
        "format": _FORMAT,
        "versions": versions | codecs,
        "formats": list(readable_formats()),
        "num_images": num_images,
        "path_bytes": len(names),
        "sha256": digest.hexdigest(),
    }
