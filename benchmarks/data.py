"""The images and weights that every tool gets: made once, the same bytes every time."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TINY_IMAGENET = "tiny-imagenet-train.zip"
SQUEEZENET = "squeezenet1_0-imagenet.safetensors"


def make_once(target: Path, make: Callable[[Path], None]) -> Path:
    """Return the target, made aside and renamed, so that it is never half there."""
    if not target.exists():
        aside = target.with_name(f"{target.name}.part")
        shutil.rmtree(aside, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        make(aside)
        aside.rename(target)
    return target


@dataclass(frozen=True)
class Store:
    """Where the images and weights are.

    Attributes:
        source: the folder with the originals.
        cache: where copies and subsets are made.
        quick: small subsets.
    """

    source: Path
    cache: Path
    quick: bool = False

    def folder(self, name: str) -> Path:
        """Return a data folder: ``photographs``, ``two-thousand``, or a number of images for ``scaling``."""
        if name == "photographs":
            most = 16 if self.quick else None
            return make_once(self._place(name), lambda to: copy_photographs(self.source, to, most))
        if name == "two-thousand":
            parts = (8, 4) if self.quick else (160, 40)
            return make_once(self._place(name), lambda to: take_classes(self._archive, to, 10, parts))
        number = int(name)
        return make_once(self._place(name), lambda to: take_of_each(self._archive, to, number // 200))

    def weights(self, arch: str) -> Path:
        """Return the weights of a network: real ones of SqueezeNet, seeded random ones of others."""
        if arch == "squeezenet1_0":
            return self.source / SQUEEZENET
        return make_once(self.cache / f"{arch}-random.safetensors", lambda to: save_random(arch, to))

    def small_network(self) -> Path:
        """Return a folder in timm's format with a very small network."""
        return make_once(self.cache / "test_resnet", save_small_network)

    @property
    def _archive(self) -> Path:
        return self.source / TINY_IMAGENET

    def _place(self, name: str) -> Path:
        return self.cache / f"{name}{'-quick' if self.quick else ''}"


def copy_photographs(source: Path, target: Path, most: int | None) -> None:
    """Copy the JPEG files of ants and bees; a GIF among them, a placeholder, is not read by every peer."""
    for folder in sorted((source / "hymenoptera").glob("*/*")):
        goal = target / folder.parent.name / folder.name
        goal.mkdir(parents=True)
        for file in sorted(folder.glob("*.jp*g"))[:most]:
            shutil.copyfile(file, goal / file.name)


def list_archive(archive: zipfile.ZipFile) -> dict[str, list[str]]:
    """Return the members of each class folder, in the order of their numbers."""
    members: defaultdict[str, list[str]] = defaultdict(list)
    for name in archive.namelist():
        if name.endswith(".webp"):
            members[Path(name).parts[-2]].append(name)
    return {label: sorted(members[label], key=lambda name: int(Path(name).stem)) for label in sorted(members)}


def take_classes(archive: Path, target: Path, num_classes: int, parts: tuple[int, int]) -> None:
    """Write ``train`` and ``val`` of a few classes, as JPEG: not every peer looks for WebP."""
    from PIL import Image

    with zipfile.ZipFile(archive) as opened:
        for label, names in list(list_archive(opened).items())[:num_classes]:
            for number, name in enumerate(names[: sum(parts)]):
                folder = target / ("train" if number < parts[0] else "val") / label
                folder.mkdir(parents=True, exist_ok=True)
                image = Image.open(io.BytesIO(opened.read(name))).convert("RGB")
                image.save(folder / f"{Path(name).stem}.jpg", quality=95)


def take_of_each(archive: Path, target: Path, number: int) -> None:
    """Write class folders with the first ``number`` files of every class, as they are."""
    with zipfile.ZipFile(archive) as opened:
        for label, names in list_archive(opened).items():
            (target / label).mkdir(parents=True)
            for name in names[:number]:
                (target / label / Path(name).name).write_bytes(opened.read(name))


def save_random(arch: str, target: Path) -> None:
    """Write the seeded random weights of one of torchvision's networks."""
    import torch
    from safetensors.torch import save_file
    from torchvision import models

    torch.manual_seed(0)
    save_file(getattr(models, arch)(weights=None).state_dict(), target)


def save_small_network(target: Path) -> None:
    """Write timm's ``test_resnet`` with seeded random weights."""
    import timm
    import torch
    from safetensors.torch import save_file

    target.mkdir()
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", num_classes=10).state_dict(), target / "model.safetensors")
    given = {"input_size": [3, 32, 32], "classifier": "fc", "first_conv": "conv1.0", "license": "apache-2.0"}
    config = {"architecture": "test_resnet", "num_classes": 10, "pretrained_cfg": given}
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
