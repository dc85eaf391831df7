"""Features of a network's layers over some pictures: what every command but ``run`` begins with.

::

    recipe -> pictures, network with its own classifier -> layers by name -> rows, from before or computed

Rows are kept by part (train, val, test), so that all commands, and runs, find each other's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from finetune.cache.shelf import Shelf
from finetune.data.check import BadImage, Checked
from finetune.data.loader import Loader, Placement
from finetune.data.sample import SPLITS, Dataset, Sample
from finetune.data.sample import Split as Part
from finetune.data.split import SplitConfig
from finetune.data.transforms import build_eval_transform
from finetune.data.unlabelled import find_pictures
from finetune.display import Display
from finetune.errors import DataError, UsageError
from finetune.features.kept import (
    FORMAT,
    KeptRows,
    Place,
    compute_batch_size,
    describe_pictures,
    row_bytes,
)
from finetune.features.rows import JoinedRows, Rows
from finetune.job.data import keep_split
from finetune.job.default_backbone import name_backbone
from finetune.job.facts import describe_source, digest_of
from finetune.job.fetch import fetch
from finetune.job.prepare import place_network, prepare_machine, resolve_preprocessing
from finetune.job.reading import read_pictures
from finetune.memory import release_memory
from finetune.recipe import Recipe, load_recipe
from finetune.runs.claim import read_split
from finetune.runs.folder import RunFolder
from finetune.runtime import Precision, resolve_workers
from finetune.strategy.freeze import digest_tensors
from finetune.world import SINGLE, World
from pretrained.backbone import Backbone, load_source
from pretrained.catalog import find_card
from pretrained.graph.layer import Layer
from pretrained.graph.layers import Layers
from pretrained.graph.pooling import Pool
from pretrained.graph.recorder import Taps
from pretrained.network import is_convolutional

_PRECISION: Precision = "float32"
"""Of features: they are numbers that people read, and half of their digits are no saving."""

LEAST_SOURCE_CLASSES = 1_000
"""Of a classifier that is asked how similar data are: ImageNet's. One of three classes called the same ants
and bees different that ImageNet's calls similar."""


@dataclass(frozen=True)
class Network:
    """A network with its own classifier, on its device, and its layers by name."""

    backbone: Backbone
    placement: Placement
    layers: Layers

    @property
    def has_classifier(self) -> bool:
        """Whether a classifier of many classes came with its weights."""
        match = self.backbone.match
        is_there = bool(match.head) and not match.head_replaced
        return is_there and self.backbone.card.num_classes >= LEAST_SOURCE_CLASSES

    @cached_property
    def weights(self) -> str:
        """Sha256 of all weights."""
        return digest_tensors(self.backbone.network, ())

    @cached_property
    def weights_below_head(self) -> str:
        """Sha256 of what runs that replace the head share."""
        last = self.backbone.stages[-1]
        if last.role != "head":
            return self.weights
        return digest_tensors(self.backbone.network, last.parameters, last.modules)


def open_network(recipe: Recipe, display: Display, world: World = SINGLE) -> Network:
    """Load a network as it was published, and find its layers.

    Raises:
        UsageError: there is none of that name, or the weights belong to another.
        EnvironmentFaultError: the weights are not here and cannot be had.
    """
    recipe = name_backbone(recipe, None, display)
    name = str(recipe.backbone.name)
    device = prepare_machine(recipe, world)
    card = find_card(name, recipe.backbone.offline)
    if not recipe.backbone.weights:
        fetch(card, recipe.backbone.offline, display)
    with display.busy(f"loading {name}"):
        card = card.with_input(resolve_preprocessing(recipe, card))
        backbone = load_source(card, recipe.backbone.weights, recipe.backbone.offline)
        layout = recipe.training.channels_last
        in_channels_last = is_convolutional(backbone.network) if layout == "auto" else bool(layout)
        placement = Placement(device, in_channels_last)
        network = place_network(backbone.network, placement).eval()
        layers = Layers(network, backbone.stages, card.preprocessing.input_size)
    display.say(f"backbone {backbone.card.name}: {backbone.match}")
    return Network(backbone, placement, layers)


def open_pictures(recipe: Recipe, display: Display) -> Dataset:
    """Find pictures: a folder with labels or without, a zip archive, a CSV file, or those of a run.

    Raises:
        UsageError: no data were named.
        DataError: there is nothing, or it has more than one reading.
    """
    if not recipe.data.path:
        raise UsageError("finetune", "no data was named", "Add --data FOLDER.")
    path, own = Path(recipe.data.path), recipe
    run = RunFolder(path)
    is_run = run.split.is_file() and run.recipe.is_file()
    if is_run:
        own = load_recipe(str(run.recipe))
    with display.count(f"reading {own.data.path}") as tell:
        data = Path(own.data.path or "")
        dataset = find_pictures(data, SplitConfig.of(own), own.data.follow_links, tell)
    if is_run:
        dataset = keep_split(dataset, run, own)
        known = {row.get("path") for row in read_split(run)}
        dataset = dataset.without({sample.path for sample in dataset.samples if sample.path not in known})
    for warning in dataset.warnings:
        display.warn(warning)
    return dataset


@dataclass(frozen=True)
class Source:
    """A network and the pictures that it is to see.

    Attributes:
        network: with its own classifier.
        dataset: pictures whose bytes could be read, by part.
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
        """Refuse to keep features of pictures that are not what they were when the command began.

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
        """Name pictures that have no features."""
        bad = {image.path: image.reason for image in self.unreadable} | dict(lost)
        for path, reason in list(bad.items())[:10]:
            self.display.warn(f"{path} cannot be read: {reason}")
        if len(bad) > 10:
            self.display.warn(f"and {len(bad) - 10} images more")


def open_source(
    recipe: Recipe, network: Network, dataset: Dataset, display: Display, checked: Checked | None = None
) -> Source:
    """Put pictures before a network; features are kept by content.

    Args:
        recipe: of what the features depend on.
        network: with its own classifier.
        dataset: the pictures.
        display: shows progress.
        checked: of ``read_pictures``, where some of the pictures were chosen since.
    """
    if checked is None:
        dataset, checked = read_pictures(recipe, dataset, display)
    own = {sample.path for sample in dataset.samples}
    bad = tuple(image for image in checked.bad if image.path in own)
    readable = dataset.without({image.path for image in bad})
    return Source(network, readable, checked.digests, bad, recipe, display)


@dataclass(frozen=True)
class Features:
    """Rows of the layers that were asked for.

    Attributes:
        layers: in the order in which they were asked for.
        rows: (N, D) of each, over the pictures in order.
        logits: (N, K) of the network's own classifier, where they were asked for.
        lost: pictures that could not be decoded; their rows are NaN.
        kept: the files.
    """

    layers: tuple[Layer, ...]
    rows: tuple[Rows, ...]
    logits: Rows | None
    lost: dict[str, str]
    kept: KeptRows

    def usable(self, samples: Sequence[Sample]) -> Tensor:
        """Return the indices of the pictures that have rows."""
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
    parts: Sequence[Part] = SPLITS,
    shelf: Shelf | None = None,
    world: World = SINGLE,
) -> Iterator[Features]:
    """Give features while the block runs: all layers from one forward pass over what is not kept yet.

    Args:
        source: network and pictures.
        layers: at least one.
        pool: of what they give.
        with_logits: and what the network's own classifier says.
        parts: whose pictures.
        shelf: where rows are kept.
        world: processes of this machine that share the work; all get the rows.

    Raises:
        DataError: no picture can be decoded.
        OSError: the rows cannot be written, and are too many for the memory.
    """
    network = source.network
    device = network.placement.device
    kept = KeptRows(
        shelf=shelf or Shelf(source.recipe.cache.max_gb * 1e9),
        device=device,
        batch_size=compute_batch_size(device, network.backbone.card.preprocessing.input_size),
        precision=_PRECISION,
        dtype=_PRECISION,
        display=source.display,
        check_unchanged=source.check_unchanged,
        world=world,
    )
    release_memory()  # decoding processes are copies of this one
    with ExitStack() as stack:
        if shelf is None and (obstacle := kept.shelf.find_obstacle(compute_bytes(source, layers, pool))):
            source.display.say(f"features are not kept for other commands: {obstacle}")
            kept.shelf = Shelf(folder=Path(stack.enter_context(TemporaryDirectory())))
        stack.callback(kept.close)
        found: list[list[Rows]] = []
        lost: dict[str, str] = {}
        for part in parts:
            samples = source.dataset.of(part)
            if samples:
                kept.lost.clear()
                found.append(_rows_of_part(source, kept, layers, pool, with_logits, part, stack))
                lost |= {samples[index].path: reason for index, reason in kept.lost.items()}
        rows = tuple(JoinedRows(same) for same in zip(*found, strict=True))
        if len(lost) == sum(len(source.dataset.of(part)) for part in parts):
            fix = "Give pictures that can be decoded."
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
    part: Part,
    stack: ExitStack,
) -> list[Rows]:
    network = source.network.backbone.network
    places = [*_places(source, kept, layers, pool, part)]
    if with_logits:
        places.append(_place_of_logits(source, kept, part))

    def open_forward(missing: Sequence[int]) -> Callable[[Tensor], Tensor]:
        wanted = [layers[number] for number in missing if number < len(layers)]
        taps = Taps(network, wanted, pool, with_logits=len(layers) in missing)
        return lambda images: torch.cat(taps(images), dim=1)

    open_loader = cache(partial(_open_loader, source, part, kept.batch_size, kept.world, stack))
    return kept.rows(places, open_forward, open_loader, 0, f"features of {part} images")


def _open_loader(source: Source, part: Part, batch_size: int, world: World, stack: ExitStack) -> Loader:
    network, recipe = source.network, source.recipe
    preprocessing = network.backbone.card.preprocessing
    batch_bytes = batch_size * 3 * preprocessing.img_size**2
    asked = recipe.data.workers
    workers = resolve_workers(network.placement.device, batch_bytes, world.size) if asked == "auto" else asked
    samples = source.dataset.of(part)
    loader = Loader(
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
        world=world,
    )
    stack.callback(loader.close)
    return loader


# --- what rows depend on -------------------------------------------------------------------------


def _places(
    source: Source, kept: KeptRows, layers: Sequence[Layer], pool: Pool, part: Part
) -> Iterator[Place]:
    shared = _shared_facts(source, kept, part, source.network.weights_below_head)
    whole = shared | {"weights": source.network.weights}
    for layer in layers:
        width = layer.num_features(pool)
        facts = {"layer": [layer.module, layer.number, layer.at_input], "pool": layer.pool_of(pool)}
        own = whole if source.network.layers.reads_head(layer) else shared
        yield Place({"kind": "layer"} | facts | {"numel": width} | own, width)


def _place_of_logits(source: Source, kept: KeptRows, part: Part) -> Place:
    width = source.network.backbone.card.num_classes
    shared = _shared_facts(source, kept, part, source.network.weights)
    return Place({"kind": "logits", "numel": width} | shared, width)


def _shared_facts(source: Source, kept: KeptRows, part: Part, weights: str) -> dict[str, Any]:
    network, recipe = source.network, source.recipe
    card = network.backbone.card
    pictures = describe_pictures([source.digests[sample.path] for sample in source.dataset.of(part)])
    return {
        "format": FORMAT,
        "batch_size": kept.batch_size,
        "weights": weights,
        **describe_source(card, network.placement, _PRECISION, recipe.deterministic),
        **pictures,
    }


def compute_bytes(source: Source, layers: Sequence[Layer], pool: Pool) -> int:
    """Return the bytes that all rows of some layers take."""
    each = sum(row_bytes(layer.num_features(pool), _PRECISION) for layer in layers)
    return each * len(source.dataset.samples)


def describe_extraction(source: Source, layers: Sequence[Layer], pool: Pool) -> str:
    """Return one sha256 of everything that features depend on."""
    device = source.network.placement.device
    size = compute_batch_size(device, source.network.backbone.card.preprocessing.input_size)
    kept = KeptRows(Shelf(), device, size, _PRECISION, _PRECISION, source.display)
    parts = [part for part in SPLITS if source.dataset.of(part)]
    return digest_of(
        [[dict(place.facts) for place in _places(source, kept, layers, pool, part)] for part in parts]
    )
