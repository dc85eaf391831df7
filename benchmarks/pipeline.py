"""The data pipeline alone: images a second on one core, beside decoding them with Pillow and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from benchmarks.data import Network, find_folder, find_network, list_images
from benchmarks.harness import Bench, Case, Question, Turn
from benchmarks.peers.common import MEAN, STD
from benchmarks.results import Figures
from finetune.data.discover import discover
from finetune.data.loader import ImageLoader, Placement
from finetune.data.split import SplitConfig
from finetune.data.transforms import Transform, build_eval_transform, build_train_transform
from pretrained.preprocessing import Preprocessing

CPU = torch.device("cpu")


def plan(_: Bench) -> list[Case]:
    """Return the one case; its tools are the views."""
    return [Case("pipeline-photographs", tuple(PASSES), "squeezenet")]


def measure(turn: Turn) -> Figures:
    """Return the seconds of one pass over all training images in this process, and images a second."""
    network = find_network(turn.case.network, turn.bench)
    folder = find_folder(network, turn.bench)
    torch.set_num_threads(1)
    batches = PASSES[turn.tool](folder, network)
    began = time.perf_counter()
    for _ in batches:
        pass
    wall = time.perf_counter() - began
    return {"wall": wall, "images_per_second": len(list_images(folder)) / wall}


def decode(folder: Path, _: Network) -> Iterable[Any]:
    """The least that anybody must do: decode to RGB."""
    for path in list_images(folder):
        with Image.open(path) as image:
            yield image.convert("RGB")


def load_ours(folder: Path, network: Network, view: Transform) -> Iterable[Any]:
    """Return our batches."""
    samples = discover(folder, SplitConfig(0.2, 0))
    keys: dict[str, Any] = {"batch_size": network.batch_size, "workers": 0, "seed": 0, "shuffle": False}
    loader = ImageLoader(
        samples, samples.of("train"), view, placement=Placement(CPU, channels_last=True), **keys
    )
    return loader.batches()


def evaluate_ours(folder: Path, network: Network) -> Iterable[Any]:
    """Return our batches with the evaluation view."""
    return load_ours(folder, network, build_eval_transform(Preprocessing(img_size=network.img_size)))


def train_ours(folder: Path, network: Network) -> Iterable[Any]:
    """Return our batches with the training view ``light``."""
    view = build_train_transform(Preprocessing(img_size=network.img_size), "light")
    return load_ours(folder, network, view)


def load_plain(folder: Path, network: Network) -> Iterable[Any]:
    """Return the batches of the tutorial."""
    crop = [transforms.RandomResizedCrop(network.img_size), transforms.RandomHorizontalFlip()]
    view = transforms.Compose([*crop, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    return DataLoader(datasets.ImageFolder(folder / "train", view), network.batch_size)


def load_timm(folder: Path, network: Network) -> Iterable[Any]:
    """Return timm's batches."""
    from timm.data import create_dataset, create_loader

    dataset, size = create_dataset("", root=str(folder), split="train", is_training=True), network.img_size
    keys = {"is_training": True, "num_workers": 0, "persistent_workers": False, "device": CPU}
    loader: Iterable[Any] = create_loader(dataset, (3, size, size), network.batch_size, **keys)
    return loader


PASSES: dict[str, Callable[[Path, Network], Iterable[Any]]] = {
    "pillow": decode,
    "finetune-evaluation": evaluate_ours,
    "finetune-training": train_ours,
    "plain-training": load_plain,
    "timm-training": load_timm,
}
QUESTION = Question("pipeline", plan, measure, {"photographs/s": "images_per_second"}, base="pillow")
