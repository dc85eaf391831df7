"""The images and weights that every tool gets: made once, the same bytes every time."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Bench

SQUEEZENET = "squeezenet1_0-imagenet.safetensors"


@dataclass(frozen=True)
class Network:
    """A network, and the images it learns on.

    Attributes:
        arch: torchvision's name.
        data: ``photographs``, ``cifar`` or ``drawn``, which need no originals.
        img_size: pixels.
        batch_size: images a step.
    """

    arch: str
    data: str
    img_size: int
    batch_size: int


NETWORKS = {
    "squeezenet": Network("squeezenet1_0", "photographs", 224, 16),
    "resnet18": Network("resnet18", "cifar", 64, 32),
    "resnet50": Network("resnet50", "cifar", 64, 32),
    "resnet50-gpu": Network("resnet50", "cifar", 224, 256),
    "resnet50-drawn": Network("resnet50", "drawn", 224, 256),
}
ON_CPU = ("squeezenet", "resnet18", "resnet50")


def list_networks(bench: Bench) -> tuple[str, ...]:
    """Return the networks that are measured on a CPU."""
    return ON_CPU[:1] if bench.quick else ON_CPU


def find_network(name: str, bench: Bench) -> Network:
    """Return a network, a smaller input where it should be quick."""
    network = NETWORKS[name]
    return Network(network.arch, network.data, 64, 8) if bench.quick else network


def make_once(target: Path, make: Callable[[Path], None]) -> Path:
    """Return the target, made aside and renamed, so that it never exists in part."""
    if not target.exists():
        aside = target.with_name(f"{target.name}.part")
        shutil.rmtree(aside, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        make(aside)
        aside.rename(target)
    return target


def find_folder(network: Network, bench: Bench) -> Path:
    """Return the data folder of a network, with ``train`` and ``val`` unless it is drawn."""
    if network.data == "drawn":
        return find_blobs(100 if bench.quick else 4000, bench, 64 if bench.quick else 400)
    target = bench.cache / f"{network.data}{'-quick' if bench.quick else ''}"
    if network.data == "photographs":
        return make_once(target, lambda to: _copy_photographs(bench, to))
    return make_once(target, lambda to: _take_cifar(bench, to, {"train": 160, "val": 40}))


def find_cifar(number: int, bench: Bench, classes: tuple[str, ...] = ()) -> Path:
    """Return a folder with so many training images a class of CIFAR-10, 100 to validate and 500 to test.

    Args:
        number: of training images a class.
        bench: for the original images and the cache.
        classes: names of some classes; all without.
    """
    target = bench.cache / "cifar10" / "-".join([f"{number}", *classes])
    wanted = {"train": number, "val": 2 if bench.quick else 100, "test": 4 if bench.quick else 500}
    return make_once(target, lambda to: _take_cifar(bench, to, wanted, classes))


def find_cifar_curves(number: int, bench: Bench) -> Path:
    """Return a folder with so many training images a class of CIFAR-10, and as ``val`` 500 of the test split.

    So every epoch is evaluated on test images, by which nothing may be chosen.
    """
    wanted = {"train": number, "val": 4 if bench.quick else 500}
    return make_once(bench.cache / "cifar10" / f"{number}-curves", lambda to: _take_cifar(bench, to, wanted))


def _copy_photographs(bench: Bench, target: Path) -> None:
    """Copy the JPEG files of ants and bees; a GIF among them, a placeholder, is not read by every peer."""
    for folder in sorted((bench.source / "hymenoptera").glob("*/*")):
        goal = target / folder.parent.name / folder.name
        goal.mkdir(parents=True)
        for file in sorted(folder.glob("*.jp*g"))[: 16 if bench.quick else None]:
            shutil.copyfile(file, goal / file.name)


def _take_cifar(bench: Bench, target: Path, wanted: Mapping[str, int], classes: Collection[str] = ()) -> None:
    """Write the first images of each class of CIFAR-10.

    Args:
        bench: for the original images.
        target: the folder.
        wanted: images a class of each split. Of three splits, ``val`` gets training images that ``train`` has
            not; of two, it gets test images.
        classes: names of some classes; all without.
    """
    splits = (
        {"train": ["train", "val"], "test": ["test"]}
        if "test" in wanted
        else {"train": ["train"], "test": ["val"]}
    )
    folders: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    with zipfile.ZipFile(bench.source / "cifar10.zip") as archive:
        for name in sorted(name for name in archive.namelist() if name.endswith(".jpg")):
            part, label = Path(name).parts[-3:-1]
            if not classes or label in classes:
                folders[part, label].append(name)
        for (part, label), names in folders.items():
            for split in splits[part]:
                folder = target / split / label
                folder.mkdir(parents=True)
                for name in names[: wanted[split]]:
                    (folder / Path(name).name).write_bytes(archive.read(name))
                del names[: wanted[split]]


def find_sets(bench: Bench) -> Path:
    """Return the folder with the five unpacked sets, each with ``train`` and ``val``."""

    def unpack(target: Path) -> None:
        with zipfile.ZipFile(bench.source / "sets.zip") as archive:
            archive.extractall(target)

    return make_once(bench.cache / "sets", unpack)


def find_weights(arch: str, bench: Bench) -> Path:
    """Return the weights of a network: real ones of SqueezeNet, seeded random ones of others."""
    if arch == "squeezenet1_0":
        return bench.source / SQUEEZENET
    return make_once(bench.cache / f"{arch}-random.safetensors", lambda to: _save_random(arch, to))


def _save_random(arch: str, target: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from torchvision import models

    torch.manual_seed(0)
    save_file(getattr(models, arch)(weights=None).state_dict(), target)


def find_recipe(network: Network, bench: Bench) -> dict[str, Any]:
    """Return the keys of a recipe that say network, data and sizes."""
    return {
        "backbone.name": f"torchvision/{network.arch}",
        "backbone.weights": str(find_weights(network.arch, bench)),
        "data.path": str(find_folder(network, bench)),
        "data.workers": 1,
        "input.img_size": network.img_size,
        "training.batch_size": network.batch_size,
    }


def list_images(folder: Path) -> list[Path]:
    """Return the training images of a data folder."""
    return sorted(path for path in (folder / "train").rglob("*") if path.is_file())


def find_small_network(bench: Bench) -> Path:
    """Return a folder in timm's format with ``test_resnet``, a very small network, and random weights."""
    return make_once(bench.cache / "test_resnet", _save_small_network)


def _save_small_network(target: Path) -> None:
    import timm
    import torch
    from safetensors.torch import save_file

    target.mkdir()
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", num_classes=10).state_dict(), target / "model.safetensors")
    given = {"input_size": [3, 32, 32], "classifier": "fc", "first_conv": "conv1.0", "license": "apache-2.0"}
    config = {"architecture": "test_resnet", "num_classes": 10, "pretrained_cfg": given}
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")


def find_blobs(number: int, bench: Bench, size: int = 32) -> Path:
    """Return a folder with so many drawn images in ten classes: for counting, not to learn.

    Args:
        number: of images.
        bench: for its cache.
        size: pixels of a side.
    """
    return make_once(bench.cache / f"blobs-{number}-{size}", lambda to: _draw_blobs(number, size, to))


def _draw_blobs(number: int, size: int, target: Path) -> None:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for index in range(number):
        folder = target / f"class{index % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((size, size)).save(folder / f"{index:06}.jpg", quality=90)
