"""Images that are decoded once and kept: in a run of several passes, and for the next run.

::

    random views:  file -> image, as large as views need it -> kept (H, W, 3) -> a view every time
    fixed views:   file -> image -> view                    -> kept (3, H, W)

What is kept is to the last bit what decoding would give, so that keeping leaves no trace in a result. The
name of the file depends on the sha256 of every image, on the view and on the versions of the decoders.

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
from finetune.system.device import available_cores
from finetune.system.display import Display

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

PER_BLOCK = 32
"""Images of a block. A killed process loses at most the ones it has begun with: two blocks of them."""
_FORMAT = 1
"""Another one for every change of what is kept, ``decode_image`` included."""
_MEASURED = 1_000
"""Images whose headers are read to tell how large all of them will be."""
_MARGIN = 1.05
"""Of that estimate."""
_THREADS = min(16, available_cores())
"""Pillow decodes outside Python's lock, so threads do spread over cores."""


class ImageCache:
    """Kept pixels, by the index of their sample.

    They are read from their file, not mapped: mapped pages would count as memory of whoever looks at them.

    Args:
        path: of the pixels, one image after the other.
        shapes: (N, 3) int; zeros where an image is not there.
        file: holds the lock that keeps others from removing it.
    """

    def __init__(self, path: Path, shapes: np.ndarray[Any, Any], file: BlockFile | None = None) -> None:
        self._path, self._shapes, self._file = path, shapes, file
        self._ends = shapes.prod(axis=1).cumsum()
        self._pixels = path.open("rb", buffering=0) if self._ends[-1] else None

    def __len__(self) -> int:
        """Return N."""
        return len(self._shapes)

    def __getitem__(self, index: int) -> Pixels | None:
        """Return the pixels of an image, to be read only, or None for one that must be decoded."""
        shape = self._shapes[index]
        num_bytes = int(shape.prod())
        if self._pixels is None or not num_bytes:
            return None
        content = os.pread(self._pixels.fileno(), num_bytes, int(self._ends[index]) - num_bytes)
        # Cut short since it was opened: the image itself is still there.
        return np.frombuffer(content, np.uint8).reshape(shape) if len(content) == num_bytes else None

    def __reduce__(self) -> tuple[type[ImageCache], tuple[Path, np.ndarray[Any, Any]]]:
        """A process that is not forked opens the file again; this one holds the lock for both."""
        return ImageCache, (self._path, self._shapes)

    def close(self) -> None:
        """Let others remove the file; what is open stays readable."""
        if self._file is not None:
            self._file.close()


class _CannotKeepError(Exception):
    """Why images are not kept, in a few words."""


def keep_images(
    dataset: Dataset,
    samples: Sequence[Sample],
    digests: Mapping[str, str],
    transform: Transform,
    cache_dir: FeatureCacheDir,
    display: Display,
    passes: int,
) -> ImageCache | None:
    """Return images without a need to decode them, decoding first those that are not kept yet.

    Args:
        dataset: resolves a sample to a file.
        samples: of one loader, in its order; at least one.
        digests: sha256 of every image that could be read, by path.
        transform: of that loader.
        shelf: where files are kept.
        display: shows progress; says why images are not kept.
        passes: over the samples that will be made.

    Returns:
        None where keeping does not pay or is not possible: each image is decoded every time.
    """
    facts = _describe(samples, digests, transform)
    path = cache_dir.path_for(facts)
    try:
        if passes < 2 and not path.exists():
            return None
        with ExitStack() as stack:
            file = _open(path, facts, len(samples), display)
            stack.callback(file.close)
            if not file.is_complete:
                if passes < 2:
                    return None
                _make_room(cache_dir, _estimate_bytes(dataset, samples, transform) - file.num_bytes)
                _fill(file, samples, partial(_read, dataset, digests, transform), display)
            stack.pop_all()
    except _CannotKeepError as error:
        display.say(f"{samples[0].split} images are decoded in every pass: {error}")
        return None
    except OSError as error:
        remove_unused(path)  # on a full disk, half of it is of no use to anybody
        said = error.strerror or str(error)
        display.say(f"{samples[0].split} images are decoded in every pass: {path} cannot be used ({said})")
        return None
    shapes = [shape or (0, 0, 0) for block in file.blocks for shape in block.note]
    return ImageCache(path, np.array(shapes), file)


def _describe(samples: Sequence[Sample], digests: Mapping[str, str], transform: Transform) -> dict[str, Any]:
    """Return everything that the kept pixels depend on."""
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
        "versions": {name: metadata.version(name) for name in packages} | decoder_facts(),
    }


def decoder_facts() -> dict[str, Any]:
    """Return what the pixels of a decoded image depend on beside its file and Pillow."""
    return {"jpeg": features.version("jpg"), "pictures": _FORMAT}


def _open(path: Path, facts: dict[str, Any], num_images: int, display: Display) -> BlockFile:
    """Open a file and compare what it holds with what was written."""
    wait = wait_for_writer(path, "another run decodes the same images", display)
    size = path.stat().st_size if path.exists() else 0
    with display.track("reading kept images", size) as advance:
        file = BlockFile(
            path, facts, -(-num_images // PER_BLOCK), wait, lambda num_bytes: advance(num_bytes, "")
        )
    if file.was_damaged:
        display.warn(f"{path} was damaged; its images are decoded again")
    return file


def _estimate_bytes(dataset: Dataset, samples: Sequence[Sample], transform: Transform) -> int:
    """Return how many bytes all pixels will have: exactly, or from the headers of some."""
    if not transform.is_random:
        return len(samples) * 3 * transform.preprocessing.img_size**2
    pixels = []
    for sample in samples[:: max(1, len(samples) // _MEASURED)]:
        with suppress(BadImageError):
            size = read_size(dataset.file(sample))
            factor = compute_factor(size, transform.short_side) if transform.short_side else 1
            pixels.append(math.prod(-(-side // factor) for side in size))
    return int(_MARGIN * 3 * len(samples) * sum(pixels) / max(len(pixels), 1))


def _make_room(cache_dir: FeatureCacheDir, num_bytes: int) -> None:
    if obstacle := cache_dir.find_obstacle(num_bytes):
        raise _CannotKeepError(f"the cache would need {num_bytes / 1e9:.2g} GB, {obstacle}")
    cache_dir.make_room(num_bytes)


def _fill(
    file: BlockFile, samples: Sequence[Sample], read: Callable[[Sample], Pixels | None], display: Display
) -> None:
    """Decode what a file does not hold yet, in many threads, block after block."""
    done = len(file.blocks) * PER_BLOCK
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="keep-pictures")
    try:
        with display.track(f"decoding {samples[0].split} images", len(samples)) as advance:
            advance(done, "")
            for block in _submit_blocks(pool, read, samples[done:]):
                pixels = []
                for future in block:
                    pixels.append(future.result())
                    advance(1, "")
                shapes = [None if one is None else one.shape for one in pixels]
                file.append(b"".join(one.tobytes() for one in pixels if one is not None), shapes)
    finally:
        pool.shutdown(cancel_futures=True)


def _submit_blocks(
    pool: ThreadPoolExecutor, read: Callable[[Sample], Pixels | None], samples: Sequence[Sample]
) -> Iterator[list[Future[Pixels | None]]]:
    """Yield what will be the images of each block; those of the next one are begun with."""
    begun: deque[list[Future[Pixels | None]]] = deque()
    for start in range(0, len(samples), PER_BLOCK):
        begun.append([pool.submit(read, sample) for sample in samples[start : start + PER_BLOCK]])
        if len(begun) == 2:
            yield begun.popleft()
    yield from begun


def _read(
    dataset: Dataset, digests: Mapping[str, str], transform: Transform, sample: Sample
) -> Pixels | None:
    """Return what is kept of an image; None of one that was lost before, whose place it keeps."""
    if sample.path not in digests:
        return None
    path = dataset.file(sample)
    try:
        image = transform.open(path)
        with path.open("rb") as file:  # after decoding: a file that was changed before is noticed here
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (BadImageError, OSError) as error:
        reason = error.reason if isinstance(error, BadImageError) else error.strerror
        raise _CannotKeepError(f"{sample.path} cannot be read any more ({reason})") from None
    if digest != digests[sample.path]:
        raise _CannotKeepError(f"{sample.path} has changed since it was checked")
    return np.asarray(image) if transform.is_random else transform(image).numpy()
