"""A dataset together with the result of scanning its files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.channels.depth import FULL, ValueRange, find_range
from finetune.data.dataset import SPLITS, Dataset, Sample, Split
from finetune.data.scan import CheckedImages
from finetune.data.scan_cache import ScanResult, read_values

SHOWN_PATHS = 20
"""Most images that an issue names, unless they belong together, as copies do."""


@dataclass(frozen=True, eq=False)
class ScannedDataset:
    """A dataset and the result of its scan; the arrays describe the N images that could be decoded.

    Attributes:
        dataset: the dataset, with all images.
        checked: result of the scan.
    """

    dataset: Dataset
    checked: CheckedImages

    @cached_property
    def samples(self) -> Sequence[Sample]:
        """The N images that could be decoded, in the order of the dataset."""
        return [sample for sample in self.dataset.samples if sample.path in self.checked.scan]

    @cached_property
    def scan(self) -> ScanResult:
        """Their rows in the scan, in the same order."""
        return self.checked.scan.select(sample.path for sample in self.samples)

    @cached_property
    def splits(self) -> NDArray[np.int8]:
        """Their splits, as indices into ``SPLITS``; (N,)."""
        index: Mapping[Split, int] = {split: number for number, split in enumerate(SPLITS)}
        return np.array([index[sample.split] for sample in self.samples], np.int8)

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Numbers of their labels; (N,)."""
        return np.array([sample.label for sample in self.samples], np.int64)

    @cached_property
    def value_range(self) -> ValueRange | None:
        """The values that become black and white in images of more than 8 bits."""
        return self.checked.find_value_range(self.dataset)

    @cached_property
    def contrasts(self) -> NDArray[np.float32]:
        """Standard deviations of the images in small, in grey levels (0 to 127.5); (N,)."""
        thumbnails: NDArray[Any] = self.scan.rows["thumbnail"]
        # The number of pixels is written out, since numpy cannot infer it from no image at all.
        thumbnails = thumbnails.reshape(len(self.samples), math.prod(thumbnails.shape[1:]))
        found: NDArray[np.float32] = thumbnails.std(axis=1, dtype=np.float32)
        low, high = self.value_range or FULL
        for index, row in enumerate(self.scan.rows):
            if (values := read_values(row)) is not None:  # its thumbnail has the image's own range
                own = find_range([values]) or FULL
                found[index] *= min(1.0, (own[1] - own[0]) / (high - low))
        return found

    def paths(self, indices: Iterable[int]) -> tuple[str, ...]:
        """Return the paths of images."""
        return tuple(self.samples[index].path for index in indices)

    def first_paths(self, indices: Iterable[int]) -> tuple[str, ...]:
        """Return the paths of the first ``SHOWN_PATHS`` images."""
        return tuple(self.samples[index].path for index, _ in zip(indices, range(SHOWN_PATHS), strict=False))

    def describe(self, index: int) -> str:
        """Return split and class of an image, such as ``train, ants``."""
        sample = self.samples[index]
        return f"{sample.split}, {self.dataset.label_of(sample)}"
