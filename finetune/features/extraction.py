"""Features of a network's layers over some images: what every command but ``run`` begins with.

::

    recipe -> images, network with its own classifier -> layers by name -> rows, from before or computed

Rows are kept by part (train, val, test), so that all commands, and runs, find each other's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from finetune.data.dataset import SPLITS, Dataset, Sample, Split
from finetune.data.discover import find_images
from finetune.data.image_cache import decoder_facts
from finetune.data.loader import ImageLoader, Placement
from finetune.data.prepare import keep_split, read_images
from finetune.data.scan import BadImage, Checked
from finetune.data.split import SplitConfig
from finetune.data.transforms import build_eval_transform
from finetune.errors import DataError, UsageError
from finetune.features.network import (
    Network,
)
from finetune.features.rows import ChainRows, Rows
from finetune.features.store import (
    FORMAT,
    KeptRows,
    RowSpec,
    compute_batch_size,
    describe_images,
    row_bytes,
)
from finetune.recipe import Recipe
from finetune.runs.cache_dir import FeatureCacheDir
from finetune.runs.folder import RunFolder
from finetune.runs.reader import RunReader
from finetune.system.device import Precision, describe_environment, release_memory, resolve_workers
from finetune.system.display import Display
from finetune.system.distributed import SINGLE_PROCESS, Distributed
from pretrained.catalog import Card
from pretrained.graph.layers import FeatureExtractor, Layer
from pretrained.graph.pooling import Pool

_PRECISION: Precision = "float32"
"""Of features: they are numbers that people read, and half of their digits are no saving."""


def open_images(recipe: Recipe, display: Display) -> Dataset:
    """Find images: a folder with labels or without, a zip archive, a CSV file, or those of a run.

    Raises:
        UsageError: no data were named.
        DataError: there is nothing, or it has more than one reading.
    """
    if not recipe.data.path:
        raise UsageError("finetune", "no data was named", "Add --data FOLDER.")
    run = RunReader(RunFolder(Path(recipe.data.path)))
    began = run.recipe if run.folder.split.is_file() and run.folder.recipe.is_file() else None
    own = began or recipe
    with display.count(f"reading {own.data.path}") as tell:
        data = Path(own.data.path or "")
        dataset = find_images(data, SplitConfig.of(own), own.data.follow_links, tell)
    if began is not None:
        dataset = keep_split(dataset, run.folder, own)
        known = run.digests.keys()
        dataset = dataset.without({sample.path for sample in dataset.samples if sample.path not in known})
    for warning in dataset.warnings:
        display.warn(warning)
    return dataset


@dataclass(frozen=True)
class Source:
    """A network and the images that it is to see.

    Attributes:
        network: with its own classifier.
        dataset: images whose bytes could be read, by part.
        digests: sha256 of each, by path.
        unreadable: the others.
        recipe: of which backbone, data, input, cache and machine count.
        display: shows progress.
    """

    network: Network
    dataset: Dataset
    digests: dict[str, str]
    unreadable: tuple[BadImage, ...]
    recipe: Recipe
    display: Display

    def check_unchanged(self, samples: Sequence[Sample]) -> None:
        """Refuse to keep features of images that are not what they were when the command began.

        Raises:
            DataError: one was changed or removed.
        """
        for sample in samples:
            try:
                with self.dataset.file(sample).open("rb") as file:
                    is_same = hashlib.file_digest(file, "sha256").hexdigest() == self.digests[sample.path]
            except OSError:
                is_same = False
            if not is_same:
                fix = "Leave the images alone while a command runs, and start again."
                raise DataError(sample.path, "it was changed or removed meanwhile", fix)

    def warn_of(self, lost: Mapping[str, str]) -> None:
        """Name images that have no features."""
        bad = {image.path: image.reason for image in self.unreadable} | dict(lost)
        for path, reason in list(bad.items())[:10]:
            self.display.warn(f"{path} cannot be read: {reason}")
        if len(bad) > 10:
            self.display.warn(f"and {len(bad) - 10} images more")


def open_source(
    recipe: Recipe, network: Network, dataset: Dataset, display: Display, checked: Checked | None = None
) -> Source:
    """Put images before a network; features are kept by content.

    Args:
        recipe: of what the features depend on.
        network: with its own classifier.
        dataset: the images.
        display: shows progress.
        checked: of ``read_images``, where some of the images were chosen since.
    """
    if checked is None:
        dataset, checked = read_images(recipe, dataset, display)
    own = {sample.path for sample in dataset.samples}
    bad = tuple(image for image in checked.bad if image.path in own)
    readable = dataset.without({image.path for image in bad})
    return Source(network, readable, checked.digests, bad, recipe, display)


@dataclass(frozen=True)
class Features:
    """Rows of the layers that were asked for.

    Attributes:
        layers: in the order in which they were asked for.
        rows: (N, D) of each, over the images in order.
        logits: (N, K) of the network's own classifier, where they were asked for.
        lost: images that could not be decoded; their rows are NaN.
        kept: the files.
    """

    layers: tuple[Layer, ...]
    rows: tuple[Rows, ...]
    logits: Rows | None
    lost: dict[str, str]
    kept: KeptRows

    def usable(self, samples: Sequence[Sample]) -> Tensor:
        """Return the indices of the images that have rows."""
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
    parts: Sequence[Split] = SPLITS,
    cache_dir: FeatureCacheDir | None = None,
    distributed: Distributed = SINGLE_PROCESS,
) -> Iterator[Features]:
    """Give features while the block runs: all layers from one forward pass over what is not kept yet.

    Args:
        source: network and images.
        layers: at least one.
        pool: of what they give.
        with_logits: and what the network's own classifier says.
        parts: whose images.
        shelf: where rows are kept.
        distributed: processes of this machine that share the work; all get the rows.

    Raises:
        DataError: no image can be decoded.
        OSError: the rows cannot be written, and are too many for the memory.
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
    release_memory()  # decoding processes are copies of this one
    with ExitStack() as stack:
        if cache_dir is None and (
            obstacle := kept.cache_dir.find_obstacle(compute_bytes(source, layers, pool))
        ):
            source.display.say(f"features are not kept for other commands: {obstacle}")
            kept.cache_dir = FeatureCacheDir(folder=Path(stack.enter_context(TemporaryDirectory())))
        stack.callback(kept.close)
        found: list[list[Rows]] = []
        lost: dict[str, str] = {}
        for part in parts:
            samples = source.dataset.of(part)
            if samples:
                kept.lost.clear()
                found.append(_rows_of_part(source, kept, layers, pool, with_logits, part, stack))
                lost |= {samples[index].path: reason for index, reason in kept.lost.items()}
        rows = tuple(ChainRows(same) for same in zip(*found, strict=True))
        if len(lost) == sum(len(source.dataset.of(part)) for part in parts):
            fix = "Give images that can be decoded."
            raise DataError(f"--data {source.recipe.data.path}", "no image can be decoded", fix)
        source.warn_of(lost)
        logits = rows[-1] if with_logits else None
        yield Features(tuple(layers), rows[: len(layers)], logits, lost, kept)


def _rows_of_part(
    source: Source,
    kept: KeptRows,
    layers: Sequence[Layer],
    pool: Pool,
    with_logits: bool,
    part: Split,
    stack: ExitStack,
) -> list[Rows]:
    network = source.network.backbone.network
    places = [*_places(source, kept, layers, pool, part)]
    if with_logits:
        places.append(_place_of_logits(source, kept, part))

    def open_forward(missing: Sequence[int]) -> Callable[[Tensor], Tensor]:
        wanted = [layers[number] for number in missing if number < len(layers)]
        extract = FeatureExtractor(network, wanted, pool, with_logits=len(layers) in missing)
        return lambda images: torch.cat(extract(images), dim=1)

    open_loader = cache(partial(_open_loader, source, part, kept.batch_size, kept.distributed, stack))
    return kept.rows(places, open_forward, open_loader, 0, f"features of {part} images")


def _open_loader(
    source: Source, part: Split, batch_size: int, distributed: Distributed, stack: ExitStack
) -> ImageLoader:
    network, recipe = source.network, source.recipe
    preprocessing = network.backbone.card.preprocessing
    batch_bytes = batch_size * 3 * preprocessing.img_size**2
    asked = recipe.data.workers
    workers = (
        resolve_workers(network.placement.device, batch_bytes, distributed.size) if asked == "auto" else asked
    )
    samples = source.dataset.of(part)
    loader = ImageLoader(
        source.dataset,
        samples,
        build_eval_transform(preprocessing),
        batch_size=batch_size,
        placement=network.placement,
        workers=min(workers, len(samples) // batch_size),
        seed=0,
        shuffle=False,
        warn=source.display.warn,
        allow_lost=True,
        distributed=distributed,
    )
    stack.callback(loader.close)
    return loader


# --- what rows depend on -------------------------------------------------------------------------


def _places(
    source: Source, kept: KeptRows, layers: Sequence[Layer], pool: Pool, part: Split
) -> Iterator[RowSpec]:
    shared = _shared_facts(source, kept, part, source.network.weights_below_head)
    whole = shared | {"weights": source.network.weights}
    for layer in layers:
        width = layer.num_features(pool)
        facts = {"layer": [*layer.point], "pool": layer.pool_of(pool)}
        own = whole if source.network.layers.reads_head(layer) else shared
        yield RowSpec({"kind": "layer"} | facts | {"numel": width} | own, width)


def _place_of_logits(source: Source, kept: KeptRows, part: Split) -> RowSpec:
    width = source.network.backbone.card.num_classes
    shared = _shared_facts(source, kept, part, source.network.weights)
    return RowSpec({"kind": "logits", "numel": width} | shared, width)


def _shared_facts(source: Source, kept: KeptRows, part: Split, weights: str) -> dict[str, Any]:
    network, recipe = source.network, source.recipe
    card = network.backbone.card
    images = describe_images([source.digests[sample.path] for sample in source.dataset.of(part)])
    return {
        "format": FORMAT,
        "batch_size": kept.batch_size,
        "weights": weights,
        **describe_source(card, network.placement, _PRECISION, recipe.deterministic),
        **images,
    }


def compute_bytes(source: Source, layers: Sequence[Layer], pool: Pool) -> int:
    """Return the bytes that all rows of some layers take."""
    each = sum(row_bytes(layer.num_features(pool), _PRECISION) for layer in layers)
    return each * len(source.dataset.samples)


def describe_extraction(source: Source, layers: Sequence[Layer], pool: Pool) -> str:
    """Return one sha256 of everything that features depend on."""
    device = source.network.placement.device
    size = compute_batch_size(device, source.network.backbone.card.preprocessing.input_size)
    kept = KeptRows(FeatureCacheDir(), device, size, _PRECISION, _PRECISION, source.display)
    parts = [part for part in SPLITS if source.dataset.of(part)]
    return digest_of(
        [[dict(place.facts) for place in _places(source, kept, layers, pool, part)] for part in parts]
    )


# --- What features depend on beside their images and their place in the network ---


_VERSIONS = ("torch", "torchvision", "timm", "pillow", "threads", "gpu", "cuda", "processor")
"""Of the environment: under other values the last bits of a feature may differ."""


def describe_source(
    card: Card, placement: Placement, precision: Precision, deterministic: bool
) -> dict[str, Any]:
    """Return network, view, arithmetic, versions and hardware; weights are the caller's to add."""
    environment = describe_environment(placement.device)
    return {
        "backbone": card.name,
        "architecture": card.architecture,
        "model_args": [[key, repr(value)] for key, value in card.model_args],
        "input": card.preprocessing.to_dict(),
        "precision": precision,
        "deterministic": deterministic,
        "decoder": decoder_facts(),
        "channels_last": placement.channels_last,
        "environment": {key: environment[key] for key in _VERSIONS},
    }


def digest_of(values: Any) -> str:
    """Return the sha256 of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
