"""What it does to accuracy, and to the time of decoding, that training views come from reduced images.

    python -m benchmarks.draft --data ../shared/data/hymenoptera \
        --weights ../shared/data/squeezenet1_0-imagenet.safetensors

Training takes a large image at a half, a quarter or an eighth of its size, which a JPEG's decoder gives for
less than the whole. Each seed trains twice, with that and from every pixel, and nothing else differs between
the two; evaluation sees every pixel both times. The sizes are small, so that photographs of 500 x 375 pixels
are reduced as those of a phone are for 224 pixels.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest import mock

from finetune.data import transforms
from finetune.data.discover import discover
from finetune.data.split import SplitConfig
from finetune.job import run
from finetune.recipe import load_recipe
from pretrained.catalog import Preprocessing

FIGURES = ("accuracy", "loss")
COLUMNS = ("size", "accuracy", "loss", "difference of accuracy", "of loss", "reduced", "decoding", "view")


def train(options: argparse.Namespace, img_size: int, seed: int, whole: bool) -> dict[str, Any]:
    """Return the figures of one run."""
    recipe = load_recipe(
        None,
        {
            "backbone.name": options.backbone,
            "backbone.weights": str(options.weights),
            "strategy.name": "freeze",
            "data.path": str(options.data),
            "data.workers": 1,
            "input.img_size": img_size,
            "training.epochs": options.epochs,
            "cache.trunk": False,
            "cache.pictures": False,
            "seed": seed,
        },
    )
    every_pixel = mock.patch.object(transforms, "_compute_short_side", return_value=None)
    with tempfile.TemporaryDirectory() as folder, every_pixel if whole else nullcontext():
        return run(recipe, Path(folder) / "run").metrics


def measure_time(data: Path, img_size: int) -> tuple[float, float, float]:
    """Return the share of training images that are reduced, and what decoding and whole views then take.

    Both as shares of the processor time that every pixel takes; the best of three passes over all images.
    """
    dataset = discover(data, SplitConfig(0.2, 0))
    view = transforms.build_train_transform(Preprocessing(img_size=img_size), "light")
    files = [dataset.file(sample) for sample in dataset.of("train")]
    images = [transforms.decode_image(file) for file in files]
    sizes = [view.open(file).size for file in files]
    share = sum(size != image.size for size, image in zip(sizes, images, strict=True)) / len(files)
    passes: list[Callable[[Path], Any]] = [
        view.open,
        transforms.decode_image,
        lambda file: view(view.open(file)),
        lambda file: view(transforms.decode_image(file)),
    ]
    reduced, whole, reduced_view, whole_view = (
        min(time_pass(work, files) for _ in range(3)) for work in passes
    )
    return share, reduced / whole, reduced_view / whole_view


def time_pass(work: Callable[[Path], Any], files: Sequence[Path]) -> float:
    """Return the seconds of processor time for all files."""
    began = time.process_time()
    for file in files:
        work(file)
    return time.process_time() - began


def compare(options: argparse.Namespace, img_size: int) -> list[str]:
    """Return a row: figures from every pixel, and by how much those from reduced images differ."""
    pairs = [
        [train(options, img_size, seed, whole) for whole in (True, False)] for seed in range(options.seeds)
    ]
    cells = [f"{img_size}"]
    for name in FIGURES:
        values = [whole[name] for whole, _ in pairs]
        cells.append(f"{mean(values):.4f} ± {stdev(values):.4f}")
    for name in FIGURES:
        differences = [reduced[name] - whole[name] for whole, reduced in pairs]
        cells.append(f"{mean(differences):+.4f} ± {stdev(differences) / len(pairs) ** 0.5:.4f}")
    share, decoding, view = measure_time(options.data, img_size)
    return [*cells, f"{share:.0%}", f"{decoding:.2f}", f"{view:.2f}"]


def main() -> None:
    """Print one row a size: mean and deviation over seeds, and mean and standard error of differences."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--backbone", default="squeezenet1_0")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    sys.stdout.write(f"| {' | '.join(COLUMNS)} |\n")
    for img_size in options.sizes:
        sys.stdout.write(f"| {' | '.join(compare(options, img_size))} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
