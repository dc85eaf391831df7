"""Tiny-ImageNet for the bundled backbone: 180 classes to train it on, and two groups of ten to judge it by.

    python -m benchmarks.tiny_imagenet tiny-imagenet-train.zip FOLDER

writes the images, ``source.csv``, ``animals.csv`` and ``things.csv`` (``path,label``) into a new folder.
The groups are drawn by a seed among the classes whose WordNet number says what they are; nobody chose them.
Validation parts are not made here: ``finetune run`` draws them by its own seed.
"""

from __future__ import annotations

import argparse
import csv
import random
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

GROUP_SIZE = 10
SEED = 0
KINDS = {"animals": re.compile("n01|n02[0-5]"), "things": re.compile("n02[6-9]|n0[34]")}
"""First digits of the WordNet numbers of ImageNet's animals, and of its things made by people."""


def draw_groups(labels: Sequence[str]) -> dict[str, list[str]]:
    """Return ``{"source": ..., "animals": ..., "things": ...}``: classes, in order, each in one group.

    Args:
        labels: WordNet numbers (``n01443537``).
    """
    rng = random.Random(SEED)
    groups = {
        name: sorted(rng.sample([label for label in sorted(labels) if kind.match(label)], GROUP_SIZE))
        for name, kind in KINDS.items()
    }
    held_out = {label for group in groups.values() for label in group}
    return {"source": sorted(set(labels) - held_out)} | groups


def write_groups(folder: Path, files: Mapping[str, Sequence[str]]) -> dict[str, Path]:
    """Write one table for each group.

    Args:
        folder: that the paths are relative to.
        files: of each class.
    """
    tables = {}
    for name, labels in draw_groups(list(files)).items():
        tables[name] = folder / f"{name}.csv"
        with tables[name].open("w", encoding="utf-8", newline="") as table:
            writer = csv.writer(table, lineterminator="\n")
            writer.writerow(("path", "label"))
            writer.writerows((path, label) for label in labels for path in sorted(files[label]))
    return tables


def main(words: Sequence[str] | None = None) -> int:
    """Unpack, and write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiny_imagenet", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("archive", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args(words)
    with zipfile.ZipFile(arguments.archive) as archive:
        names = [name for name in archive.namelist() if name.endswith(".webp")]
        archive.extractall(arguments.folder, names)
    files: dict[str, list[str]] = {}
    for name in names:
        files.setdefault(name.partition("/")[0], []).append(name)
    for group, table in write_groups(arguments.folder, files).items():
        with table.open(encoding="utf-8") as lines:
            sys.stderr.write(f"{group}: {sum(1 for _ in lines) - 1:,} images, {table}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
