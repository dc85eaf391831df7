"""The data sets on which the bundled backbone is put beside the same network from random weights.

It has met none of them: digits, photographs of ants and bees, and two groups of ten classes of Tiny-ImageNet
that were kept from it (``benchmarks/tiny_imagenet.py``). A seed draws which pictures are learned from.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np

from benchmarks.data import make_once
from finetune.data.samples import open_sample

Files = dict[str, list[Path]]
"""Pictures of each class, in order."""
EVERY = 0
"""Images a class: all that there are."""
EPOCHS = {10: 20, 50: 10, EVERY: 5}
"""Of training, by images a class: few images make short epochs."""


@dataclass(frozen=True)
class Origin:
    """Where the pictures lie.

    Attributes:
        photographs: folder with ``train`` and ``val`` of ants and bees.
        tiny: folder with the tables of Tiny-ImageNet's groups.
    """

    photographs: Path
    tiny: Path


@dataclass(frozen=True)
class DataSet:
    """A kind of pictures.

    Attributes:
        name: unique.
        find: finds the pictures.
        val: images a class that choose the epoch.
        test: images a class to judge on; 0 where there is a part of its own for that.
    """

    name: str
    find: Callable[[Origin], tuple[Files, Files]]
    val: int
    test: int


def find_digits(_: Origin) -> tuple[Files, Files]:
    """Return scikit-learn's digits, and no part to judge on."""
    return _read_folder(open_sample("sample:digits")), {}


def find_photographs(origin: Origin) -> tuple[Files, Files]:
    """Return ants and bees; their own validation part is the one to judge on."""
    return _read_folder(origin.photographs / "train"), _read_folder(origin.photographs / "val")


def find_animals(origin: Origin) -> tuple[Files, Files]:
    """Return ten kinds of animals."""
    return _read_table(origin.tiny / "animals.csv"), {}


def find_things(origin: Origin) -> tuple[Files, Files]:
    """Return ten kinds of things made by people."""
    return _read_table(origin.tiny / "things.csv"), {}


DATASETS = {
    one.name: one
    for one in (
        DataSet("digits", find_digits, 20, 60),
        DataSet("ants-bees", find_photographs, 20, 0),
        DataSet("animals", find_animals, 50, 100),
        DataSet("things", find_things, 50, 100),
    )
}


def _read_folder(folder: Path) -> Files:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    suffixes = {".jpg", ".png"}
    return {name: sorted(p for p in (folder / name).iterdir() if p.suffix in suffixes) for name in names}


def _read_table(table: Path) -> Files:
    files: Files = {}
    with table.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            files.setdefault(row["label"], []).append(table.parent / row["path"])
    return files


def make_folder(dataset: DataSet, per_class: int, seed: int, cache: Path, origin: Origin) -> Path:
    """Return a folder with ``train``, ``val`` and ``test``, made once.

    The pictures to judge on, and those that choose the epoch, are the same for any number to learn from.
    """
    name = f"{dataset.name}-{per_class or 'every'}-{seed}"
    return make_once(cache / name, lambda target: _write(dataset, per_class, seed, target, origin))


def _write(dataset: DataSet, per_class: int, seed: int, target: Path, origin: Origin) -> None:
    rng = np.random.default_rng([seed, crc32(dataset.name.encode())])
    files, judged = dataset.find(origin)
    for label, paths in files.items():
        drawn = [paths[number] for number in rng.permutation(len(paths))]
        rest = drawn[dataset.test + dataset.val :]
        parts = {
            "test": judged.get(label, drawn[: dataset.test]),
            "val": drawn[dataset.test :][: dataset.val],
            "train": rest[:per_class] if per_class else rest,
        }
        for part, chosen in parts.items():
            folder = target / part / label
            folder.mkdir(parents=True)
            for path in chosen:
                os.link(path.resolve(), folder / path.name)
