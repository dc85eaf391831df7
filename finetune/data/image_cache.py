"""A cache of decoded images on disk, for the passes of a run and for later runs.

::

    random views:  file -> image, as large as views need it -> cached (H, W, 3) -> a new view every time
    fixed views:   file -> image -> view                    -> cached (3, H, W)

Cached pixels are bitwise equal to decoded ones, so the cache does not change any result. The name of the
cache file depends on the SHA-256 of every image, on the view and on the versions of the decoders.

Shape legend: N images, H W pixels.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import features

from finetune.data.dataset import Dataset, Sample
from finetune.data.decode import BadImageError, compute_factor, read_size
from finetune.data.transforms import Transform
from finetune.runs.block_file import BlockFile, remove_unused
from finetune.runs.cache_dir import FeatureCacheDir, wait_for_writer
from finetune.runs.journal import Block
from finetune.system.device import available_cores
from finetune.system.display import Display
from finetune.system.regular_files import open_regular

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

PER_BLOCK = 32
"""Images per block. A killed process loses at most the two blocks that it was decoding."""
_FORMAT = 2
"""Format version; raised with every change of the cached pixels, including those of ``decode_image``."""
_MEASURED = 1_000
"""Number of images whose headers are read to estimate the size of all."""
_MARGIN = 1.05
"""Factor by which the estimate is raised."""
_THREADS = min(16, available_cores())
"""Pillow releases Python's lock while it decodes, so threads use several cores."""


class ImageCache:
    """Cached pixels by index of the sample.

    They are read from the file, not memory-mapped: mapped pages would count as memory of every process that
    reads them.

    Args:
        path: the file with the pixels of all images in order.
        shapes: (N, 3) int; zeros for an image that is not cached.
        file: holds the lock that prevents other processes from removing the file.
    """

    def __init__(self, path: Path, shapes: np.ndarray[Any, Any], file: BlockFile | None = None) -> None:
        self._path, self._shapes, self._file = path, shapes, file
        self._ends = shapes.prod(axis=1).cumsum()
        self._pixels = open_regular(path) if self._ends[-1] else None

    def __len__(self) -> int:
        """Return the number of images (N)."""
        return len(self._shapes)

    def __getitem__(self, index: int) -> Pixels | None:
        """Return the pixels of an image (a read-only array), or None for one that must be decoded."""
        shape = self._shapes[index]
        num_bytes = int(shape.prod())
        if self._pixels is None or not num_bytes:
            return None
        content = os.pread(self._pixels.fileno(), num_bytes, int(self._ends[index]) - num_bytes)
        # None if the file was truncated since it was opened: the image can still be decoded.
        return np.frombuffer(content, np.uint8).reshape(shape) if len(content) == num_bytes else None

    def __reduce__(self) -> tuple[type[ImageCache], tuple[Path, np.ndarray[Any, Any]]]:
        """Let a process that is not forked open the file again; this process holds the lock for both."""
        return ImageCache, (self._path, self._shapes)

    def close(self) -> None:
        """Release the lock: others may remove the file, which stays readable here."""
        if self._file is not None:
            self._file.close()


class _CannotCacheError(Exception):
    """Images cannot be cached; the message says why in a few words."""


def keep_images(
    dataset: Dataset,
    samples: Sequence[Sample],
    digests: Mapping[str, str],
    transform: Transform,
    cache_dir: FeatureCacheDir,
    display: Display,
    passes: int,
) -> ImageCache | None:
    """Return the image cache of a loader; images that are not cached yet are decoded first.

    Args:
        dataset: the dataset of the samples, which resolves them to files.
        samples: the samples of one loader, in order; at least one.
        digests: SHA-256 of every image that could be read, by path.
        transform: the transform of that loader.
        cache_dir: folder of the cache files.
        display: shows progress, and the reason if images cannot be cached.
        passes: number of passes over the samples.

    Returns:
        The cache, or None if it does not pay or is not possible: images are then decoded in every pass.
    """
    if not transform.preprocessing.is_rgb:  # an array is read as fast from its own file
        return None
    facts = _describe(samples, digests, transform)
    path = cache_dir.path_for(facts)
    try:
        if passes < 2 and not path.exists():
            return None
        with ExitStack() as stack:
            file = _open(path, facts, partial(_fits, transform, len(samples)), len(samples), display)
            stack.callback(file.close)
            if not file.is_complete:
                if passes < 2:
                    return None
                _make_room(cache_dir, _estimate_bytes(dataset, samples, transform) - file.num_bytes)
                _fill(file, samples, partial(_read, dataset, digests, transform), display)
            stack.pop_all()
    except _CannotCacheError as error:
        display.say(f"{samples[0].split} images are decoded in every pass: {error}")
        return None
    except OSError as error:
        remove_unused(path)  # on a full disk, an incomplete file only takes space
        reason = error.strerror or str(error)
        display.say(f"{samples[0].split} images are decoded in every pass: {path} cannot be used ({reason})")
        return None
    shapes = [shape or (0, 0, 0) for block in file.blocks for shape in block.note]
    return ImageCache(path, np.array(shapes), file)


def _describe(samples: Sequence[Sample], digests: Mapping[str, str], transform: Transform) -> dict[str, Any]:
    """Return everything that the cached pixels depend on."""
    images = hashlib.sha256()
    for sample in samples:
        images.update(f"{digests.get(sample.path, 'unreadable')}\n".encode())
    short_side, plain = f"short side {transform.short_side}", transform.preprocessing.to_dict()
    packages = ("pillow",) if transform.is_random else ("pillow", "timm", "torchvision")
    return {
        "kind": "pictures",
        "images": images.hexdigest(),
        "num_images": len(samples),
        "view": short_side if transform.is_random else plain,
        **_value_range(transform),
        "versions": {name: metadata.version(name) for name in packages} | decoder_facts(),
    }


def _value_range(transform: Transform) -> dict[str, Any]:
    value_range = transform.preprocessing.value_range
    return {} if value_range is None or not transform.is_random else {"value_range": list(value_range)}


def decoder_facts() -> dict[str, Any]:
    """Return what decoded pixels depend on besides the file and the version of Pillow."""
    return {"jpeg": features.version("jpg"), "pictures": _FORMAT}


def _fits(transform: Transform, num_images: int, number: int, block: Block) -> bool:
    """Return whether a block holds the pixels of its images; its note is the shape of each, or null."""
    shapes = block.note
    if not isinstance(shapes, list) or len(shapes) != min(PER_BLOCK, num_images - number * PER_BLOCK):
        return False
    kept = [shape for shape in shapes if shape is not None]
    if not all(_is_shape(shape, transform) for shape in kept):
        return False
    return sum(map(math.prod, kept)) == block.num_bytes


def _is_shape(shape: Any, transform: Transform) -> bool:
    if not transform.is_random:
        return bool(shape == list(transform.preprocessing.input_size))
    is_list = isinstance(shape, list) and len(shape) == 3 and shape[2] == 3
    return is_list and all(type(side) is int and side > 0 for side in shape)


def _open(
    path: Path,
    facts: dict[str, Any],
    fits: Callable[[int, Block], bool],
    num_images: int,
    display: Display,
) -> BlockFile:
    """Open a cache file and verify its content."""
    wait = wait_for_writer(path, "another run decodes the same images", display)
    size = path.stat().st_size if path.exists() else 0
    with display.track("reading kept images", size) as advance:
        file = BlockFile(
            path, facts, -(-num_images // PER_BLOCK), wait, lambda num_bytes: advance(num_bytes, ""), fits
        )
    if file.was_damaged:
        display.warn(f"{path} was damaged; its images are decoded again")
    return file


def _estimate_bytes(dataset: Dataset, samples: Sequence[Sample], transform: Transform) -> int:
    """Return the size of all pixels in bytes: exact for fixed views, else estimated from some headers."""
    if not transform.is_random:
        return len(samples) * transform.preprocessing.view_bytes
    pixels = []
    for sample in samples[:: max(1, len(samples) // _MEASURED)]:
        with suppress(BadImageError):
            size = read_size(dataset.file(sample))
            factor = compute_factor(size, transform.short_side) if transform.short_side else 1
            pixels.append(math.prod(-(-side // factor) for side in size))
    return int(_MARGIN * 3 * len(samples) * sum(pixels) / max(len(pixels), 1))


def _make_room(cache_dir: FeatureCacheDir, num_bytes: int) -> None:
    if obstacle := cache_dir.find_obstacle(num_bytes):
        raise _CannotCacheError(f"the cache would need {num_bytes / 1e9:.2g} GB, {obstacle}")
    cache_dir.make_room(num_bytes)


def _fill(
    file: BlockFile, samples: Sequence[Sample], read: Callable[[Sample], Pixels | None], display: Display
) -> None:
    """Decode the images that a file does not hold yet, in threads, block by block."""
    done = len(file.blocks) * PER_BLOCK
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="cache-images")
    try:
        with display.track(f"decoding {samples[0].split} images", len(samples)) as advance:
            advance(done, "")
            for block in _submit_blocks(pool, read, samples[done:]):
                pixels = []
                for future in block:
                    pixels.append(future.result())
                    advance(1, "")
                shapes = [None if array is None else array.shape for array in pixels]
                file.append(b"".join(array.tobytes() for array in pixels if array is not None), shapes)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _submit_blocks(
    pool: ThreadPoolExecutor, read: Callable[[Sample], Pixels | None], samples: Sequence[Sample]
) -> Iterator[list[Future[Pixels | None]]]:
    """Yield the futures of each block's images; decoding of the next block has then started too."""
    started: deque[list[Future[Pixels | None]]] = deque()
    for start in range(0, len(samples), PER_BLOCK):
        started.append([pool.submit(read, sample) for sample in samples[start : start + PER_BLOCK]])
        if len(started) == 2:
            yield started.popleft()
    yield from started


def _read(
    dataset: Dataset, digests: Mapping[str, str], transform: Transform, sample: Sample
) -> Pixels | None:
    """Return the pixels to cache of an image; None for one that an earlier attempt lost."""
    if sample.path not in digests:
        return None
    path = dataset.file(sample)
    try:
        image = transform.open(path)
        with open_regular(path) as file:  # after decoding, so that a change before it is noticed
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (BadImageError, OSError) as error:
        reason = error.reason if isinstance(error, BadImageError) else error.strerror
        raise _CannotCacheError(f"{sample.path} cannot be read any more ({reason})") from None
    if digest != digests[sample.path]:
        raise _CannotCacheError(f"{sample.path} has changed since it was checked")
    return np.asarray(image) if transform.is_random else transform(image).numpy()
