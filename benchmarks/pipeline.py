"""The data pipeline alone: images a second on one core, beside decoding them with Pillow and nothing else.

    python -m benchmarks.pipeline --arch squeezenet1_0 --img-size 224 --data ./photographs

One process, one thread, in turns over the same files: the bare decode, our two views through our loader
(decoding in the process itself), the tutorial's view, and timm's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from benchmarks.limits import read_arguments
from finetune.data.loader import ImageLoader
from finetune.data.transforms import build_eval_transform, build_train_transform
from finetune.recipe import load_recipe
from finetune.run.setup import prepare
from finetune.system.display import SilentDisplay

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build_passes(options: argparse.Namespace) -> dict[str, Callable[[], Iterable[Any]]]:
    """Return what goes through all training images once, by name."""
    files = sorted(path for path in (options.data / "train").rglob("*") if path.is_file())
    ours = build_ours(options)
    crop = [transforms.RandomResizedCrop(options.img_size), transforms.RandomHorizontalFlip()]
    view = transforms.Compose([*crop, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    plain = DataLoader(datasets.ImageFolder(options.data / "train", view), options.batch_size)
    return {
        "pillow": lambda: (decode(path) for path in files),
        "ours_evaluation": ours["evaluation"].batches,
        "ours_training": ours["training"].batches,
        "plain_training": lambda: plain,
        "timm_training": lambda: build_timm(options),
    }


def decode(path: Path) -> Image.Image:
    """The least that anybody must do: decode to RGB."""
    with Image.open(path) as image:
        return image.convert("RGB")


def build_ours(options: argparse.Namespace) -> dict[str, ImageLoader]:
    """Return our loaders of the training images, with the evaluation view and with the training view."""
    recipe = load_recipe(
        None,
        {
            "backbone.name": f"torchvision/{options.arch}",
            "backbone.weights": str(options.weights),
            "data.path": str(options.data),
            "input.img_size": options.img_size,
        },
    )
    ready = prepare(recipe, SilentDisplay())
    torch.set_num_threads(1)
    preprocessing = ready.backbone.card.preprocessing
    views = {
        "evaluation": build_eval_transform(preprocessing),
        "training": build_train_transform(preprocessing, "light"),
    }
    keys: dict[str, Any] = {"batch_size": options.batch_size, "placement": ready.placement}
    keys |= {"workers": 0, "seed": 0, "shuffle": False}
    samples = ready.dataset.of("train")
    return {name: ImageLoader(ready.dataset, samples, view, **keys) for name, view in views.items()}


def build_timm(options: argparse.Namespace) -> Iterable[Any]:
    """Return timm's training loader."""
    from timm.data import create_dataset, create_loader

    dataset = create_dataset("", root=str(options.data), split="train", is_training=True)
    size = (3, options.img_size, options.img_size)
    loader: Iterable[Any] = create_loader(
        dataset,
        size,
        options.batch_size,
        is_training=True,
        num_workers=0,
        persistent_workers=False,
        device=torch.device("cpu"),
    )
    return loader


def main() -> None:
    """Measure, and print one line."""
    options = read_arguments()
    torch.set_num_threads(1)
    passes = build_passes(options)
    number = sum(path.is_file() for path in (options.data / "train").rglob("*"))
    rates: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(2 if options.quick else 3):
        for name, start in passes.items():
            began = time.perf_counter()
            for _ in start():
                pass
            rates[name].append(number / (time.perf_counter() - began))
    sys.stdout.write(json.dumps({name: median(values) for name, values in rates.items()}) + "\n")


if __name__ == "__main__":
    main()
