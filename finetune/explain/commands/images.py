"""The images that are explained: found, decoded in threads, and normalised, batch by batch.

Shape legend: B images of a batch, H W pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from finetune.data.decode import BadImageError
from finetune.data.inputs import InputImage
from finetune.data.prepare import check_outside
from finetune.data.transforms import Normalizer, Transform, build_eval_transform, draw_view
from finetune.errors import DataError, UsageError, count
from finetune.evaluation.prediction_inputs import find_prediction_inputs, list_inputs
from finetune.evaluation.predictor import CPU_BATCH, split_batches
from finetune.explain.commands.model import require_images
from finetune.features.extraction import open_images
from finetune.features.network import Network
from finetune.recipe import Recipe
from finetune.runs.files import write_csv
from finetune.system.device import available_cores
from finetune.system.display import Display
from finetune.system.distributed import SINGLE_PROCESS

_AHEAD = 2
"""Batches that are decoded while the network computes another one."""
_SHOWN = 5
"""Largest number of unreadable images named in a warning; the file lists all."""
_Opened = tuple[Tensor, tuple[int, int]]


@dataclass(frozen=True)
class ImageBatch:
    """Images that could be read.

    Attributes:
        images: their paths, B of them.
        views: (B, 3, H, W) uint8 on the CPU, what the network sees of each; of bands (B, C, H, W) float32.
        pixels: (B, C, H, W) float32, the same normalised, on the device of the network.
        sizes: width and height of each image before it was resized, upright.
    """

    images: Sequence[InputImage]
    views: Tensor
    pixels: Tensor
    sizes: Sequence[tuple[int, int]]

    def picture(self, index: int) -> Image.Image:
        """Return what the network sees of one image, as an RGB image."""
        return draw_view(self.views[index])


def find_images(
    recipe: Recipe, images: Sequence[str], output: Path, display: Display
) -> tuple[InputImage, ...]:
    """Return the images that are explained, those named one by one before those of ``--data``.

    Args:
        recipe: its ``data.path`` is the ``--data``, which may be left out if there are ``images``.
        images: files, folders, CSV files, patterns, or ``-`` for paths on standard input.
        output: the folder of the results.
        display: shows progress.

    Raises:
        UsageError: no images were named, or the output lies among them.
        DataError: an input does not exist, or holds no images.
    """
    if not images and not recipe.data.path:
        raise UsageError("finetune explain", "no images were named", "Name images, or add --data FOLDER.")
    found: list[InputImage] = []
    for asked in images:
        inputs, _ = list_inputs(find_prediction_inputs(asked, output, SINGLE_PROCESS), display)
        found += inputs.open()
    if recipe.data.path:
        dataset = open_images(recipe, display, draws=False)
        check_outside(output, dataset)
        found += [InputImage(sample.path, dataset.file(sample)) for sample in dataset.samples]
    return tuple(found)


class ImageReader:
    """Reads images in batches for one network, and remembers those that cannot be read.

    Args:
        network: gives preprocessing and device.

    Raises:
        UsageError: the network takes arrays.

    Attributes:
        bad: the reason for each image that could not be read, by path.
        transform: the view of an image that the network sees.
    """

    def __init__(self, network: Network) -> None:
        preprocessing = network.backbone.card.preprocessing
        require_images(network)
        self.bad: dict[str, str] = {}
        self.transform: Transform = build_eval_transform(preprocessing)
        self._device = network.placement.device
        self._normalize = Normalizer(preprocessing, self._device)

    def read(self, images: Sequence[InputImage], batch_size: int = CPU_BATCH) -> Iterator[ImageBatch]:
        """Yield batches in order, while the next ones are decoded; memory does not grow with their number.

        Images that cannot be read are left out, so that a batch may be smaller; none is empty.
        """
        waiting: deque[tuple[list[InputImage], list[Future[_Opened | str]]]] = deque()
        pool = ThreadPoolExecutor(available_cores(), thread_name_prefix="decode")
        try:
            for batch in split_batches(images, batch_size):
                waiting.append((batch, [pool.submit(self._view, image) for image in batch]))
                if len(waiting) > _AHEAD:
                    yield from self._collect(*waiting.popleft())
            while waiting:
                yield from self._collect(*waiting.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # an image may take a minute

    def _view(self, image: InputImage) -> _Opened | str:
        """Return the view and the size of an image, or the reason why it cannot be read."""
        if image.fault:
            return image.fault
        try:
            opened = self.transform.open(image.file)
            size = opened.size if isinstance(opened, Image.Image) else opened.shape[:0:-1]
            return self.transform(opened), size
        except BadImageError as error:
            return error.reason

    def _collect(
        self, batch: Sequence[InputImage], futures: Sequence[Future[_Opened | str]]
    ) -> Iterator[ImageBatch]:
        good: list[tuple[InputImage, _Opened]] = []
        for image, future in zip(batch, futures, strict=True):
            opened = future.result()
            if isinstance(opened, str):
                self.bad[image.path] = opened
            else:
                good.append((image, opened))
        if good:
            views = torch.stack([view for _, (view, _) in good])
            images, sizes = [image for image, _ in good], [size for _, (_, size) in good]
            yield ImageBatch(images, views, self._normalize(views.to(self._device)), sizes)

    def report_bad(self, folder: Path, num_images: int, display: Display) -> None:
        """Warn of images that could not be read, and list them in ``bad_images.csv``.

        Args:
            folder: the folder of the results.
            num_images: number of all images that were asked for.
            display: shows the warnings.

        Raises:
            DataError: none could be read.
        """
        for path, reason in list(self.bad.items())[:_SHOWN]:
            display.warn(f"{path} cannot be read: {reason}")
        if num_images and len(self.bad) == num_images:
            path, reason = next(iter(self.bad.items()))
            found = f"none of {count(num_images, 'image')} can be read ({path}: {reason})"
            raise DataError("finetune explain", found, "Name images that can be decoded.")
        if self.bad:
            write_csv(folder / "bad_images.csv", sorted(self.bad.items()), ("path", "reason"))
            display.warn(f"{count(len(self.bad), 'image')} left out; listed in bad_images.csv")
