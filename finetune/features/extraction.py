"""Features of a network's layers over some images: the first step of every command but ``run``.

::

    recipe -> images, network with its own classifier -> layers by name -> rows, from the cache or computed

Rows are cached by split (train, val, test), so that all commands and runs share them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.data.channels.bands import check_takes, find_display_range, measure_channels
from finetune.data.channels.depth import ValueRange
from finetune.data.dataset import SPLITS, Dataset, PreparedDataset, Sample, Split
from finetune.data.discover import find_images
from finetune.data.image_cache import decoder_facts
from finetune.data.loader import ImageLoader, Placement
from finetune.data.prepare import keep_split, read_images
from finetune.data.split import SplitConfig
from finetune.data.tables.config import TableConfig
from finetune.data.transforms import build_eval_transform
from finetune.errors import DataError, UsageError
from finetune.features.network import Network
from finetune.features.regions import Region, describe_region, hide_outside
from finetune.features.rows import ChainRows, Rows
from finetune.features.runtime import choose_runtime, describe_runtime, open_forward
from finetune.features.store import (
    FORMAT,
    Forward,
    KeptRows,
    RowSpec,
    compute_batch_size,
    describe_images,
    row_bytes,
)
from finetune.recipe import Recipe, Runtime
from finetune.runs.cache_dir import FeatureCacheDir, cache_faults
from finetune.runs.folder import RunFolder
from finetune.runs.reader import RunReader
from finetune.system.device import (
    Precision,
    describe_environment,
    resolve_most_workers,
    resolve_workers,
)
from finetune.system.display import Display
from finetune.system.distributed import SINGLE_PROCESS, Distributed
from finetune.system.memory import release_memory
from finetune.system.regular_files import open_regular
from finetune.system.temporary import temporary_folder
from pretrained.catalog import Card
from pretrained.graph.layers import FeatureExtractor, Layer
from pretrained.graph.pooling import Pool

_PRECISION: Precision = "float32"
"""Precision of features. Users read them, so they keep all digits."""


def open_images(recipe: Recipe, display: Display, draws: bool = True) -> Dataset:
    """Find images: a folder with or without class folders, an archive, a CSV file, or the data of a run.

    Args:
        recipe: names the data.
        display: shows progress and warnings.
        draws: whether a validation split is drawn where the data give none. A run's data keep its split.

    Raises:
        UsageError: no data were named.
        DataError: there are no images, or the layout is ambiguous.
    """
    if not recipe.data.path:
        raise UsageError("finetune", "no data was named", "Add --data FOLDER.")
    run = RunReader(RunFolder(Path(recipe.data.path)))
    began = run.recipe if run.folder.split.is_file() and run.folder.recipe.is_file() else None
    own = began or recipe
    with display.count(f"reading {own.data.path}") as tell:
        data = Path(own.data.path or "")
        draws = draws or began is not None
        table = TableConfig.of(own)
        dataset = find_images(data, SplitConfig.of(own), own.data.follow_links, tell, draws, table)
    if began is not None:
        dataset = keep_split(dataset, run.folder, own)
        known = run.digests.keys()
        dataset = dataset.without({sample.path for sample in dataset.samples if sample.path not in known})
    for warning in dataset.warnings:
        display.warn(warning)
    return dataset


@dataclass(frozen=True)
class Source:
    """A network, and the images whose features it computes.

    Attributes:
        network: the network with its own classifier.
        dataset: the images that can be read.
        recipe: settings of backbone, data, input, cache and machine.
        display: shows progress.
        region: the part of each image that the network sees.
    """

    network: Network
    dataset: PreparedDataset
    recipe: Recipe
    display: Display
    region: Region = "whole"

    @cached_property
    def runtime(self) -> Runtime:
        """What computes the features."""
        backbone, device = self.network.backbone, self.network.placement.device
        num_pixels = len(self.dataset.samples) * math.prod(backbone.card.preprocessing.size)
        return choose_runtime(self.recipe.runtime, backbone.network, device, _PRECISION, num_pixels)

    @property
    def value_range(self) -> ValueRange | None:
        """The values that are drawn as black and white, of images of more than 8 bits."""
        return find_display_range(self.network.backbone.card.preprocessing)

    def check_unchanged(self, samples: Sequence[Sample]) -> None:
        """Check that images did not change since the command began, before their features are cached.

        Raises:
            DataError: an image was changed or removed.
        """
        for sample in samples:
            before = self.dataset.digests[sample.path]
            try:
                with open_regular(self.dataset.file(sample)) as file:
                    is_same = hashlib.file_digest(file, "sha256").hexdigest() == before
            except OSError:
                is_same = False
            if not is_same:
                fix = "Do not change images while a command runs, and start again."
                raise DataError(sample.path, "it was changed or removed meanwhile", fix)

    def warn_of(self, lost: Mapping[str, str]) -> None:
        """Warn of the images that have no features."""
        bad = {image.path: image.reason for image in self.dataset.unreadable} | dict(lost)
        for path, reason in list(bad.items())[:10]:
            self.display.warn(f"{path} cannot be read: {reason}")
        if len(bad) > 10:
            self.display.warn(f"and {len(bad) - 10} more images")


def open_source(recipe: Recipe, network: Network, dataset: Dataset, display: Display) -> Source:
    """Read the images whose features a network computes.

    Args:
        recipe: settings that the features depend on.
        network: the network with its own classifier.
        dataset: the images, which are read unless they were prepared before.
        display: shows progress.

    Raises:
        DataError: the images are arrays and the network takes images, or the other way round.
    """
    check_takes(network.backbone.card, dataset)
    prepared = dataset if isinstance(dataset, PreparedDataset) else read_images(recipe, dataset, display)
    view = measure_channels(network.backbone.card.preprocessing, prepared, display)
    network = replace(network, backbone=network.backbone.with_input(view))
    if view.value_range is None:  # or the images are seen as in its training
        network = network.with_value_range(prepared.value_range)
    return Source(network, prepared.readable, recipe, display)


@dataclass(frozen=True)
class Features:
    """The features of some layers.

    Attributes:
        layers: the layers, in the order in which they were asked for.
        rows: features (N, D) of each layer, over the images in order.
        logits: (N, K) of the network's own classifier; None if not asked for.
        lost: why images could not be decoded, by path; their rows are NaN.
        kept: the cache that holds the rows.
    """

    layers: tuple[Layer, ...]
    rows: tuple[Rows, ...]
    logits: Rows | None
    lost: dict[str, str]
    kept: KeptRows

    def usable(self, samples: Sequence[Sample]) -> Tensor:
        """Return the indices of the images that have rows, (M,) int64."""
        return torch.tensor(
            [i for i, one in enumerate(samples) if one.path not in self.lost], dtype=torch.int64
        )


@contextmanager
def open_features(
    source: Source,
    layers: Sequence[Layer],
    pool: Pool,
    *,
    with_logits: bool = False,
    splits: Sequence[Split] = SPLITS,
    cache_dir: FeatureCacheDir | None = None,
    distributed: Distributed = SINGLE_PROCESS,
) -> Iterator[Features]:
    """Give features while the block runs; one forward pass computes all layers that are not cached.

    Args:
        source: the network and the images.
        layers: the layers, at least one.
        pool: how a layer's output becomes a row.
        with_logits: also return the logits of the network's own classifier.
        splits: the splits whose images are used.
        cache_dir: where rows are cached; None for the user's cache.
        distributed: processes of this machine that share the work; all get the rows.

    Raises:
        DataError: no image can be decoded.
        DiskError: the rows cannot be written, and do not fit in memory.
    """
    network = source.network
    device = network.placement.device
    kept = KeptRows(
        cache_dir=cache_dir or FeatureCacheDir(source.recipe.cache.max_gb * 1e9),
        device=device,
        batch_size=compute_batch_size(device, network.backbone.card.preprocessing.input_size),
        precision=_PRECISION,
        dtype=_PRECISION,
        display=source.display,
        check_unchanged=source.check_unchanged,
        distributed=distributed,
    )
    release_memory()  # decoding processes are forked from this one
    with ExitStack() as stack:
        if cache_dir is None and (
            obstacle := kept.cache_dir.find_obstacle(compute_bytes(source, layers, pool))
        ):
            source.display.say(f"features are not cached for other commands: {obstacle}")
            kept.cache_dir = FeatureCacheDir(folder=stack.enter_context(temporary_folder()))
        stack.callback(kept.close)
        found: list[list[Rows]] = []
        lost: dict[str, str] = {}
        forward_of = cache(partial(_open_forward, source, tuple(layers), pool))  # one export for all splits
        for split in splits:
            if samples := source.dataset.of(split):
                kept.lost.clear()
                places = [*_places(source, kept, layers, pool, split, with_logits)]
                open_loader = partial(_open_loader, source, kept, split, stack)
                with cache_faults(kept.cache_dir.folder):
                    found.append(kept.rows(places, forward_of, open_loader, 0, f"features of {split} images"))
                lost |= {samples[index].path: reason for index, reason in kept.lost.items()}
        rows = tuple(ChainRows(same) for same in zip(*found, strict=True))
        if len(lost) == sum(len(source.dataset.of(split)) for split in splits):
            fix = "Name images that can be decoded."
            raise DataError(f"--data {source.recipe.data.path}", "no image can be decoded", fix)
        source.warn_of(lost)
        logits = rows[-1] if with_logits else None
        yield Features(tuple(layers), rows[: len(layers)], logits, lost, kept)


def _open_forward(source: Source, layers: Sequence[Layer], pool: Pool, missing: tuple[int, ...]) -> Forward:
    """Return the function that computes some of the layers, by index; after the last one come the logits."""
    network, placement = source.network.backbone, source.network.placement
    wanted = [layers[number] for number in missing if number < len(layers)]
    extract = FeatureExtractor(network.network, wanted, pool, with_logits=len(layers) in missing)
    input_size = network.card.preprocessing.input_size
    hide = hide_outside(source.region, input_size, placement.device)

    def forward(images: Tensor) -> Tensor:
        return torch.cat(extract(hide(images)), dim=1)

    return open_forward(source.runtime, network.network, forward, placement, input_size, source.display)


def _open_loader(
    source: Source, kept: KeptRows, split: Split, stack: ExitStack, numbers: tuple[int, ...] | None
) -> ImageLoader:
    """Return the loader of a split, or of the images with some numbers in it."""
    network, recipe = source.network, source.recipe
    preprocessing = network.backbone.card.preprocessing
    batch_bytes = kept.batch_size * preprocessing.view_bytes
    workers, most = recipe.data.workers, 0
    if workers == "auto":
        workers = resolve_workers(network.placement.device, batch_bytes, kept.distributed.size)
        most = resolve_most_workers(batch_bytes, kept.distributed.size)
    samples = source.dataset.of(split)
    if numbers is not None:
        samples = tuple(samples[number] for number in numbers)
    num_batches = len(samples) // kept.batch_size
    loader = ImageLoader(
        source.dataset,
        samples,
        build_eval_transform(preprocessing),
        batch_size=kept.batch_size,
        placement=network.placement,
        workers=min(workers, num_batches),
        max_workers=min(most, num_batches),
        persistent=False,
        seed=0,
        shuffle=False,
        warn=source.display.warn,
        allow_lost=True,
        distributed=kept.distributed,
    )
    stack.callback(loader.close)
    return loader


# --- what rows depend on -------------------------------------------------------------------------


def _places(
    source: Source,
    kept: KeptRows,
    layers: Sequence[Layer],
    pool: Pool,
    split: Split,
    with_logits: bool = False,
) -> Iterator[RowSpec]:
    images = tuple(source.dataset.digests[sample.path] for sample in source.dataset.of(split))
    shared = _shared_facts(source, kept) | describe_images(images)
    whole = shared | {"weights": source.network.weights}
    for layer in layers:
        width = layer.num_features(pool)
        facts = {"layer": [*layer.point], "pool": layer.pool_of(pool)}
        own = whole if source.network.layers.reads_head(layer) else shared
        yield RowSpec({"kind": "layer"} | facts | {"numel": width} | own, width, images)
    if with_logits:
        width = source.network.backbone.card.num_classes
        yield RowSpec({"kind": "logits", "numel": width} | whole, width, images)


def _shared_facts(source: Source, kept: KeptRows) -> dict[str, Any]:
    network, recipe = source.network, source.recipe
    card = network.backbone.card
    return {
        "format": FORMAT,
        "batch_size": kept.batch_size,
        "weights": network.weights_below_head,
        **describe_region(source.region),
        **describe_source(card, network.placement, _PRECISION, source.runtime, recipe.deterministic),
    }


def compute_bytes(source: Source, layers: Sequence[Layer], pool: Pool) -> int:
    """Return the size in bytes of the rows of some layers over all images."""
    each = sum(row_bytes(layer.num_features(pool), _PRECISION) for layer in layers)
    return each * len(source.dataset.samples)


def describe_extraction(source: Source, layers: Sequence[Layer], pool: Pool) -> str:
    """Return the sha256 of everything that the features depend on."""
    device = source.network.placement.device
    size = compute_batch_size(device, source.network.backbone.card.preprocessing.input_size)
    kept = KeptRows(FeatureCacheDir(), device, size, _PRECISION, _PRECISION, source.display)
    splits = [split for split in SPLITS if source.dataset.of(split)]
    return digest_of(
        [[dict(place.facts) for place in _places(source, kept, layers, pool, split)] for split in splits]
    )


# --- what features depend on, besides the images and the layer ------------------------------------


_VERSIONS = ("torch", "torchvision", "timm", "pillow", "threads", "gpu", "cuda", "processor")
"""Parts of the environment that the last bits of a feature depend on."""


def describe_source(
    card: Card, placement: Placement, precision: Precision, runtime: Runtime, deterministic: bool
) -> dict[str, Any]:
    """Return network, preprocessing, precision, versions and hardware; the caller adds the weights."""
    environment = describe_environment(placement.device)
    return {
        "backbone": card.name,
        "architecture": card.architecture,
        "model_args": [[key, repr(value)] for key, value in card.model_args],
        "input": card.preprocessing.to_dict(),
        "precision": precision,
        "runtime": describe_runtime(runtime),
        "deterministic": deterministic,
        "decoder": decoder_facts(),
        "channels_last": placement.channels_last,
        "environment": {key: environment[key] for key in _VERSIONS},
    }


def digest_of(values: Any) -> str:
    """Return the sha256 of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
