"""What the commands on single feature maps share: the images that excite each map most, and their patches.

The images of ``--data`` go through the cache of features (docs/cache.md): the strongest activation of every
map is a feature of the pool ``max``. So a pass that was interrupted resumes, and the next command on these
layers needs none. Images that are named one by one are looked at directly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune.data.inputs import InputImage
from finetune.data.prepare import check_outside
from finetune.errors import DataError, UsageError
from finetune.evaluation.predictor import CPU_BATCH
from finetune.explain.commands.images import ImageBatch, ImageReader, find_images
from finetune.explain.positions import MapPosition
from finetune.explain.receptive_field import find_boxes
from finetune.explain.top_units import TopRecorder, TopUnits, find_peaks
from finetune.explain.units import Box, Unit
from finetune.features.extraction import Source, open_features, open_images, open_source
from finetune.features.network import Network
from finetune.recipe import Recipe
from finetune.runs.files import write_csv
from finetune.system.display import Display

NUM_TOP = 9
"""Images of a feature map, as in Zeiler and Fergus' figure."""
_BLOCK = 4096
"""Rows of features that are read at a time."""


@dataclass(frozen=True)
class Excited:
    """A unit and the image that excites it.

    Attributes:
        image: the image.
        unit: the strongest unit of its feature map in this image.
        activation: of the unit.
        box: the pixels that the unit can see.
    """

    image: InputImage
    unit: Unit
    activation: float
    box: Box


@dataclass(frozen=True)
class StrongLayer:
    """The strongest units of all feature maps of a layer.

    Attributes:
        name: the layer.
        position: where it is.
        top: what one pass over the images found.
        images: the images that could be read, in the order of the indices in ``top``.
    """

    name: str
    position: MapPosition
    top: TopUnits
    images: Sequence[InputImage]

    @property
    def num_maps(self) -> int:
        """Number of feature maps."""
        return self.top.values.shape[1]

    @property
    def num_silent(self) -> int:
        """Number of feature maps without a positive activation in any image."""
        return self.num_maps - len(self.top.rank_maps())

    def choose(self, asked: Sequence[int] | None, most: int) -> list[int]:
        """Return the feature maps that are shown: those asked for, else the strongest.

        Raises:
            UsageError: there is no such map.
        """
        if asked is None:
            return self.top.rank_maps()[:most]
        if wrong := [number for number in asked if not 0 <= number < self.num_maps]:
            found = f"layer {self.name} has {self.num_maps} feature maps, numbered from 0"
            raise UsageError(f"--maps {wrong[0]}", found, f"Take numbers below {self.num_maps}.")
        return list(dict.fromkeys(asked))

    def find_excited(self, network: Network, maps: Sequence[int]) -> dict[int, list[Excited]]:
        """Return, for each feature map, the images that excite it most, the strongest first.

        Raises:
            DataError: one of the images can no longer be read.
        """
        found = [(number, *one) for number in maps for one in self.top.strongest(number)]
        indices = sorted({image for _, image, _ in found})
        peaks = _locate(network, self.position, {index: self.images[index] for index in indices})
        units = [peaks[image][number] for number, image, _ in found]
        size = network.backbone.card.preprocessing.input_size
        boxes = find_boxes(network.backbone.network, self.position, size, units)
        excited: dict[int, list[Excited]] = {number: [] for number in maps}
        for (number, image, activation), unit, box in zip(found, units, boxes, strict=True):
            excited[number].append(Excited(self.images[image], unit, activation, box))
        return excited


def _locate(
    network: Network, position: MapPosition, images: Mapping[int, InputImage]
) -> dict[int, list[Unit]]:
    """Return the strongest unit of every feature map in some images, by the index of the image."""
    found: dict[int, list[Unit]] = {}
    indices = iter(images)
    for batch in _read_again(network, list(images.values()), CPU_BATCH):
        for units in find_peaks(network.backbone.network, position, batch.pixels):
            found[next(indices)] = units
    return found


# --- the images -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """The images that are looked at.

    Attributes:
        network: the network, which sees them.
        images: those that were named one by one; those of ``--data`` without a source.
        source: the images of ``--data``, whose features are kept; None if images were named one by one.
    """

    network: Network
    images: Sequence[InputImage]
    source: Source | None

    @property
    def num_asked(self) -> int:
        """Number of images that were asked for, those that cannot be read included."""
        if self.source is None:
            return len(self.images)
        return len(self.source.dataset.samples) + len(self.source.dataset.unreadable)


def open_pictures(
    recipe: Recipe, network: Network, images: Sequence[str], output: Path, display: Display
) -> Pictures:
    """Find the images that a command looks at.

    Args:
        recipe: its ``data.path`` is the ``--data``, which may be left out if there are ``images``.
        network: the network.
        images: files, folders, CSV files, patterns, or ``-`` for paths on standard input.
        output: the folder of the results.
        display: shows progress.

    Raises:
        UsageError: no images were named, or the output lies among them.
        DataError: an input does not exist, or holds no images.
    """
    if images or not recipe.data.path:
        return Pictures(network, find_images(recipe, images, output, display), None)
    dataset = open_images(recipe, display, draws=False)
    check_outside(output, dataset)
    source = open_source(recipe, network, dataset, display)
    return Pictures(source.network, (), source)


def find_strongest(
    pictures: Pictures, positions: Mapping[str, MapPosition], folder: Path, display: Display
) -> list[StrongLayer]:
    """Find the images that excite every feature map of some layers most, in one pass over all images at most.

    Args:
        pictures: the images.
        positions: the layers by name.
        folder: the folder of the results, for the list of images that cannot be read.
        display: shows progress.

    Raises:
        DataError: none of the images can be read.
    """
    if pictures.source is not None:
        return _find_kept(pictures.source, positions, folder, display)
    reader, seen = ImageReader(pictures.network), list[InputImage]()
    recorder = TopRecorder(pictures.network.backbone.network, list(positions.values()), NUM_TOP)
    with display.track("looking at images", len(pictures.images)) as advance:
        for batch in reader.read(pictures.images):
            recorder.add(batch.pixels)
            seen += batch.images
            advance(len(batch.images), "")
    reader.report_bad(folder, len(pictures.images), display)
    layers = zip(positions.items(), recorder.layers, strict=True)
    return [StrongLayer(name, position, top, seen) for (name, position), top in layers]


def _find_kept(
    source: Source, positions: Mapping[str, MapPosition], folder: Path, display: Display
) -> list[StrongLayer]:
    """Find them from the features that are kept; those that are not are computed in one pass, and kept."""
    layers = [source.network.layers.at(position.point) for position in positions.values()]
    samples = source.dataset.samples
    with open_features(source, layers, "max") as features:
        usable = features.usable(samples)
        tops = [TopUnits(NUM_TOP) for _ in layers]
        with display.track("comparing images", len(usable)) as advance:
            for part in torch.split(usable, _BLOCK):
                for top, rows in zip(tops, features.rows, strict=True):
                    top.add(rows[part])
                advance(len(part), "")
        bad = {image.path: image.reason for image in source.dataset.unreadable} | features.lost
    if bad:
        write_csv(folder / "bad_images.csv", sorted(bad.items()), ("path", "reason"))
    images = [InputImage(samples[i].path, source.dataset.file(samples[i])) for i in usable.tolist()]
    return [
        StrongLayer(name, position, top, images)
        for (name, position), top in zip(positions.items(), tops, strict=True)
    ]


def read_excited(network: Network, excited: Sequence[Excited]) -> ImageBatch:
    """Read the images of some units again, in order.

    Args:
        network: the network.
        excited: at least one.

    Raises:
        DataError: one of them can no longer be read.
    """
    [batch] = _read_again(network, [one.image for one in excited], len(excited))
    return batch


def _read_again(network: Network, images: Sequence[InputImage], batch_size: int) -> Iterator[ImageBatch]:
    reader = ImageReader(network)
    yield from reader.read(images, batch_size)
    for path, reason in reader.bad.items():
        fix = "Do not change images while a command runs, and start again."
        raise DataError(path, f"it can no longer be read: {reason}", fix)


def describe_layers(layers: Sequence[StrongLayer], shown: Mapping[str, Sequence[int]]) -> dict[str, object]:
    """Return what ``explain.json`` says of the layers and their feature maps."""
    return {
        layer.name: {
            "num_maps": layer.num_maps,
            "num_silent": layer.num_silent,
            "maps": list(shown[layer.name]),
        }
        for layer in layers
    }
