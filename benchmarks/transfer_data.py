"""The data sets on which the bundled backbone is put beside the same network from random weights.

Digits, photographs of ants and bees, and two groups of ten classes of Tiny-ImageNet that were kept from it
(``benchmarks/tiny_imagenet.py``). Bees are among the classes that it was trained on, and some of these very
photographs among their images: whatever it may have met is left out (``benchmarks/transfer_seen.py``).
A seed draws which images are learned from.
"""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np

from benchmarks.data import make_once
from benchmarks.transfer_seen import find_seen
from finetune.data.samples import open_sample

Files = dict[str, list[Path]]
"""Images of each class, in order."""
EVERY = 0
"""Images a class: all that there are."""
SIZES = (10, 50, EVERY)
"""Images a class to learn from."""


@dataclass(frozen=True)
class Origin:
    """Where the images lie.

    Attributes:
        photographs: folder with ``train`` and ``val`` of ants and bees.
        tiny: folder with the tables of Tiny-ImageNet's groups.
        cache: where folders are made.
    """

    photographs: Path
    tiny: Path
    cache: Path

    def leave_out_seen(self, name: str, files: Files) -> Files:
        """Return the images of a data set that the backbone cannot have met."""
        source = [path for paths in _read_table(self.tiny / "source.csv").values() for path in paths]
        every = [path for paths in files.values() for path in paths]
        seen = find_seen(every, source, self.cache / f"likeness-{name}.json")
        return {label: [path for path in paths if path not in seen] for label, paths in files.items()}


@dataclass(frozen=True)
class DataSet:
    """A kind of images.

    Attributes:
        name: unique.
        find: finds the images.
        val: images a class that choose the epoch.
        test: images a class to judge on; 0 where there is a part of its own for that.
        epochs: of training, with 10, 50 and all images a class: few images make short epochs.
    """

    name: str
    find: Callable[[Origin], tuple[Files, Files]]
    val: int
    test: int
    epochs: tuple[int, int, int]

    def find_epochs(self, per_class: int) -> int:
        """Return the epochs of a number of images a class."""
        return self.epochs[SIZES.index(per_class)]


def find_digits(_: Origin) -> tuple[Files, Files]:
    """Return scikit-learn's digits, and no part to judge on."""
    return _read_folder(open_sample("sample:digits")), {}


def find_photographs(origin: Origin) -> tuple[Files, Files]:
    """Return ants and bees; what is left of their own validation part is the one to judge on."""
    parts = {part: _read_folder(origin.photographs / part) for part in ("train", "val")}
    train, val = (origin.leave_out_seen(f"ants-bees-{part}", files) for part, files in parts.items())
    return train, val


def find_animals(origin: Origin) -> tuple[Files, Files]:
    """Return ten kinds of animals."""
    return origin.leave_out_seen("animals", _read_table(origin.tiny / "animals.csv")), {}


def find_things(origin: Origin) -> tuple[Files, Files]:
    """Return ten kinds of things made by people."""
    return origin.leave_out_seen("things", _read_table(origin.tiny / "things.csv")), {}


DATASETS = {
    one.name: one
    for one in (
        DataSet("digits", find_digits, 20, 60, (20, 10, 5)),
        DataSet("ants-bees", find_photographs, 20, 0, (20, 10, 10)),
        DataSet("animals", find_animals, 50, 100, (20, 10, 2)),
        DataSet("things", find_things, 50, 100, (20, 10, 2)),
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


def make_folder(dataset: DataSet, per_class: int, seed: int, origin: Origin) -> Path:
    """Return a folder with ``train``, ``val`` and ``test``, made once.

    The images to judge on, and those that choose the epoch, are the same for any number to learn from.
    """
    name = f"{dataset.name}-{per_class or 'every'}-{seed}"
    return make_once(origin.cache / name, lambda target: _write(dataset, per_class, seed, target, origin))


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
                _place(path, folder / path.name)


def _place(path: Path, target: Path) -> None:
    """A second name costs nothing; another file system takes a copy."""
    try:
        os.link(path.resolve(), target)
    except OSError:
        shutil.copyfile(path, target)
