"""The data sets on which strategies are compared: of different size, and more or less like ImageNet.

Each is a folder with ``train``, ``val`` and ``test``, drawn by a seed: another seed draws other images, and
of Tiny-ImageNet other classes. Rendered images are kept inside the part that an evaluation view shows.

Tiny-ImageNet is made of ImageNet's training images, so the network has met these very images: no data set
could be more similar, and its figures are kind.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.data import TINY_IMAGENET, list_archive, make_once

VERSION = 1
"""Of the images; raised when the same seed would draw others."""
SIDE = 112
"""Pixels of a rendered image: what is resized before the centre crop of 96."""
PARTS = ("train", "val", "test")

Floats = NDArray[np.floating[Any]]
Class = tuple[str, list[bytes]]
"""A label, and its encoded images: those of train, of val, and the rest of test."""


@dataclass(frozen=True)
class DataSet:
    """A kind of images, and how many.

    Attributes:
        name: unique.
        kind: a key of ``SOURCES``.
        likeness: to ImageNet, in a word.
        train: images a class to learn from.
        test: images a class to judge on; None takes what the source has kept for that.
        epochs: of training, for every strategy.
    """

    name: str
    kind: str
    likeness: str
    train: int
    test: int | None
    epochs: int

    @property
    def val(self) -> int:
        """Images a class that choose the epoch."""
        return min(20, self.train)


DATASETS = (
    DataSet("ants-bees-20", "hymenoptera", "similar", 20, None, 10),
    DataSet("tiny-imagenet-10", "tiny_imagenet", "similar", 10, 40, 10),
    DataSet("digits-10", "digits", "different", 10, 50, 10),
    DataSet("textures-10", "textures", "different", 10, 50, 10),
    DataSet("ants-bees-100", "hymenoptera", "similar", 100, None, 10),
    DataSet("counting-60", "counting", "different", 60, 50, 10),
    DataSet("textures-80", "textures", "different", 80, 50, 8),
    DataSet("digits-60", "digits", "different", 60, 50, 8),
    DataSet("tiny-imagenet-100", "tiny_imagenet", "similar", 100, 40, 8),
)
"""Sizes and epochs were chosen so that ``freeze``, ``top`` and ``full`` with three seeds take about 40
minutes of one core: 8 epochs for the three largest, and none of more than 1,000 images."""


def make_folder(dataset: DataSet, seed: int, folder: Path, shared: Path) -> Path:
    """Return the data folder of a seed, made once."""
    name = f"{dataset.kind}-{dataset.train}-{dataset.val}-{dataset.test or 'own'}-{seed}-v{VERSION}"
    return make_once(folder / name, lambda target: write_parts(dataset, seed, target, shared))


def write_parts(dataset: DataSet, seed: int, target: Path, shared: Path) -> None:
    """Write the images of all parts."""
    # The kind is part of the seed and the size is not: small and large ones of a kind have the same classes.
    rng = np.random.default_rng([seed, crc32(dataset.kind.encode())])
    ends = (dataset.train, dataset.train + dataset.val, None)
    for label, images in SOURCES[dataset.kind](dataset, rng, shared):
        for part, start, end in zip(PARTS, (0, *ends), ends, strict=False):
            folder = target / part / label
            folder.mkdir(parents=True)
            for number, content in enumerate(images[start:end]):
                suffix = "png" if content.startswith(b"\x89PNG") else "jpg"
                (folder / f"{number:03}.{suffix}").write_bytes(content)


def draw_hymenoptera(dataset: DataSet, rng: np.random.Generator, shared: Path) -> Iterator[Class]:
    """Yield ants and bees; their own validation part is the one to judge on."""
    for label in ("ants", "bees"):
        files, judged = (
            sorted((shared / "hymenoptera" / part / label).glob("*.jpg")) for part in ("train", "val")
        )
        chosen = rng.permutation(len(files))[: dataset.train + dataset.val]
        yield label, [file.read_bytes() for file in [*(files[number] for number in chosen), *judged]]


def draw_tiny_imagenet(dataset: DataSet, rng: np.random.Generator, shared: Path) -> Iterator[Class]:
    """Yield ten classes, drawn anew with each seed."""
    with zipfile.ZipFile(shared / TINY_IMAGENET) as archive:
        members = list_archive(archive)
        for label in sorted(rng.choice(sorted(members), 10, replace=False)):
            chosen = rng.permutation(len(members[label]))[: count(dataset)]
            names = [members[label][number] for number in chosen]
            yield str(label), [encode(Image.open(io.BytesIO(archive.read(name)))) for name in names]


def draw_digits(dataset: DataSet, rng: np.random.Generator, shared: Path) -> Iterator[Class]:  # noqa: ARG001
    """Yield scikit-learn's handwritten digits of 8 x 8, enlarged, white on black."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    images, labels = load_digits(return_X_y=True)
    for label in range(10):
        chosen = rng.permutation(np.flatnonzero(labels == label))[: count(dataset)]
        grey = [np.pad(images[number].reshape(8, 8) * (255 / 16), 2).astype(np.uint8) for number in chosen]
        large = [Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for image in grey]
        yield str(label), [encode(image) for image in large]


def draw_textures(dataset: DataSet, rng: np.random.Generator, shared: Path) -> Iterator[Class]:  # noqa: ARG001
    """Yield eight kinds of surface: any colours, scale and direction, with noise and uneven light."""
    for label, pattern in PATTERNS.items():
        yield label, [encode(paint(pattern(rng), rng)) for _ in range(count(dataset))]


def draw_counting(dataset: DataSet, rng: np.random.Generator, shared: Path) -> Iterator[Class]:  # noqa: ARG001
    """Yield one to six ellipses on a noisy ground; their sizes say nothing of their number."""
    for number in range(1, 7):
        yield str(number), [encode(draw_ellipses(number, rng)) for _ in range(count(dataset))]


SOURCES: dict[str, Callable[[DataSet, np.random.Generator, Path], Iterator[Class]]] = {
    "hymenoptera": draw_hymenoptera,
    "tiny_imagenet": draw_tiny_imagenet,
    "digits": draw_digits,
    "textures": draw_textures,
    "counting": draw_counting,
}


def count(dataset: DataSet) -> int:
    """Return the images of a class in all parts."""
    return dataset.train + dataset.val + (dataset.test or 0)


def encode(image: Image.Image) -> bytes:
    """Return an image as PNG."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


# --- textures: each is a surface of heights around 0, about as wide as [-1, 1] ---------------------------


@cache
def grid() -> tuple[Floats, Floats]:
    """Return the columns and rows of all pixels, measured from the middle."""
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float32) - SIDE / 2
    return columns, rows


def turned_grid(rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Return the same of a grid that is turned and moved at random."""
    columns, rows = grid()
    angle, (right, down) = rng.uniform(0, np.pi), rng.uniform(-SIDE, SIDE, 2)
    x = np.cos(angle) * columns - np.sin(angle) * rows + right
    y = np.sin(angle) * columns + np.cos(angle) * rows + down
    return x, y


def pick_wavelength(rng: np.random.Generator) -> float:
    """Return pixels from crest to crest."""
    return float(np.exp(rng.uniform(np.log(8), np.log(24))))


def wave(distance: Floats, wavelength: float) -> Floats:
    """Return a wave of the height of 1."""
    height: Floats = np.sin(distance * (2 * np.pi / wavelength))
    return height


def sharpen(height: Floats, factor: float) -> Floats:
    """Return a surface with steeper edges."""
    steeper: Floats = np.tanh(factor * height)
    return steeper


def stripes(rng: np.random.Generator) -> Floats:
    """Return straight waves."""
    return wave(turned_grid(rng)[0], pick_wavelength(rng))


def ripples(rng: np.random.Generator) -> Floats:
    """Return waves whose crests wind."""
    x, y = turned_grid(rng)
    wavelength = pick_wavelength(rng)
    bends = wavelength * rng.uniform(0.1, 0.4) * wave(y, wavelength * rng.uniform(1.5, 3))
    return wave(x + bends, wavelength)


def plaid(rng: np.random.Generator) -> Floats:
    """Return straight waves laid over others across."""
    x, y = turned_grid(rng)
    across = rng.uniform(0.3, 1) * wave(y, pick_wavelength(rng))
    return (wave(x, pick_wavelength(rng)) + across) / 1.4


def checks(rng: np.random.Generator) -> Floats:
    """Return the squares of a chess board."""
    x, y = turned_grid(rng)
    wavelength = 1.4 * pick_wavelength(rng)
    return sharpen(wave(x, wavelength) * wave(y, wavelength), rng.uniform(1, 4))


def scatter(rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Return how far, in spacings, each pixel is from the nearest and the second of scattered points."""
    columns, rows = grid()
    spacing = 1.2 * pick_wavelength(rng)
    line = np.arange(-SIDE / 2, SIDE / 2 + 2 * spacing, spacing)
    points = np.stack(np.meshgrid(line, line)).reshape(2, -1)
    points = (points + rng.uniform(-0.4, 0.4, points.shape) * spacing).astype(
        np.float32
    )  # half the memory, half the time
    distances = np.hypot(columns[..., None] - points[0], rows[..., None] - points[1]) / spacing
    nearest = np.partition(distances, 1, axis=-1)
    return nearest[..., 0], nearest[..., 1]


def spots(rng: np.random.Generator) -> Floats:
    """Return round spots, strewn about."""
    return sharpen(rng.uniform(0.25, 0.35) - scatter(rng)[0], rng.uniform(4, 8))


def cells(rng: np.random.Generator) -> Floats:
    """Return patches with walls between them."""
    nearest, second = scatter(rng)
    return sharpen(second - nearest - 0.15, rng.uniform(4, 8))


def filtered_noise(stretch: float, rng: np.random.Generator) -> Floats:
    """Return noise without features smaller than a wavelength, drawn out in one direction."""
    columns, rows = np.meshgrid(np.fft.fftfreq(SIDE), np.fft.fftfreq(SIDE))
    angle = rng.uniform(0, np.pi)
    along = np.cos(angle) * columns - np.sin(angle) * rows
    across = np.sin(angle) * columns + np.cos(angle) * rows
    kept = np.exp(-((np.hypot(along * stretch, across) * pick_wavelength(rng)) ** 2))
    noise = np.fft.ifft2(np.fft.fft2(rng.normal(size=(SIDE, SIDE))) * kept).real
    height: Floats = noise / (1.5 * noise.std())
    return height


def clouds(rng: np.random.Generator) -> Floats:
    """Return noise that is the same in all directions."""
    return filtered_noise(1.0, rng)


def fibres(rng: np.random.Generator) -> Floats:
    """Return noise that is drawn out."""
    return filtered_noise(float(rng.uniform(1.5, 3)), rng)


PATTERNS = {work.__name__: work for work in (cells, checks, clouds, fibres, plaid, ripples, spots, stripes)}


def paint(height: Floats, rng: np.random.Generator) -> Image.Image:
    """Return a surface in two colours, with noise and a slope of light."""
    columns, rows = grid()
    low = rng.uniform(0, 1, 3)
    high = pick_colour(low, rng)
    share = (np.clip(height, -1.2, 1.2) + 1.2) / 2.4
    light = 1 + (columns * rng.uniform(-0.4, 0.4) + rows * rng.uniform(-0.4, 0.4)) / SIDE
    colours = (low + (high - low) * share[..., None]) * light[..., None]
    return add_noise(colours, 0.3, rng)


def add_noise(colours: Floats, most: float, rng: np.random.Generator) -> Image.Image:
    """Return colours in [0, 1] as an image with the grain of a poor camera."""
    grain = rng.normal(0, rng.uniform(0.02, most), colours.shape)
    return Image.fromarray((np.clip(colours + grain, 0, 1) * 255).astype(np.uint8))


# --- counting ----------------------------------------------------------------------------------------


def place_ellipses(number: int, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Return middles and longer radii of ellipses that do not touch."""
    size = rng.uniform(5, 11)
    placed: list[tuple[float, float, float]] = []
    while len(placed) < number:
        radius = size * rng.uniform(0.8, 1.25)
        edge = SIDE * 0.4375 - radius  # the centre crop shows 87.5 %
        x, y = rng.uniform(-edge, edge, 2)
        if all(np.hypot(x - other[0], y - other[1]) > radius + other[2] + 2 for other in placed):
            placed.append((x, y, radius))
    return placed


def draw_ellipses(number: int, rng: np.random.Generator) -> Image.Image:
    """Return a number of ellipses, each of its own colour, on clouds."""
    columns, rows = grid()
    ground = rng.uniform(0.2, 0.8, 3)
    colours = ground + 0.06 * clouds(rng)[..., None] * rng.uniform(-1, 1, 3)
    for x, y, radius in place_ellipses(number, rng):
        angle, flatness = rng.uniform(0, np.pi), rng.uniform(1, 2)
        along = np.cos(angle) * (columns - x) - np.sin(angle) * (rows - y)
        across = np.sin(angle) * (columns - x) + np.cos(angle) * (rows - y)
        inside = np.hypot(along, across * flatness) < radius
        colours[inside] = pick_colour(ground, rng)
    return add_noise(colours, 0.12, rng)


def pick_colour(ground: Floats, rng: np.random.Generator) -> Floats:
    """Return a colour that can be seen on the ground."""
    while True:
        colour = rng.uniform(0, 1, 3)
        if np.abs(colour - ground).max() > 0.3:
            return colour
