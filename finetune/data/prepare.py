"""The data of a run: every image looked at, the unreadable listed, the split recorded."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from finetune.data.dataset import (
    SPLITS,
    Dataset,
    PreparedDataset,
    Split,
    describe_images,
    sample_order,
)
from finetune.data.scan import scan_images
from finetune.data.split import SplitConfig, keep_copies_together
from finetune.errors import DataError, UsageError, count
from finetune.recipe import Recipe
from finetune.runs.files import write_csv, write_text
from finetune.runs.folder import RunFolder
from finetune.runs.reader import SPLIT_COLUMNS, RunReader
from finetune.system.device import derive_seed
from finetune.system.display import Display
from finetune.targets import SINGLE


def draw_copies_together(
    dataset: Dataset, digests: Mapping[str, str], recipe: Recipe, display: Display
) -> Dataset:
    """Return a dataset with a drawn split in which exact copies stay together; report the images moved."""
    dataset, moved = keep_copies_together(dataset, digests, SplitConfig.of(recipe))
    if moved:
        display.say(f"exact copies stay in one split: {count(moved, 'image')} moved between train and val")
    return dataset


def keep_split(dataset: Dataset, folder: RunFolder, recipe: Recipe) -> Dataset:
    """Return the dataset with the split that an earlier attempt drew, if its settings were the same.

    Where the data name no validation split, it is drawn from what is there; an image that has vanished since
    would change the draw.
    """
    if not dataset.val_was_drawn:
        return dataset
    run = RunReader(folder)
    if run.recipe is None or SplitConfig.of(run.recipe) != SplitConfig.of(recipe):
        return dataset
    drawn = {row["path"]: split for row in run.split for split in SPLITS if split == row["split"]}
    samples = [replace(sample, split=drawn.get(sample.path, sample.split)) for sample in dataset.samples]
    settled = frozenset(sample.path for sample in samples if sample.path in drawn)
    return replace(dataset, samples=tuple(sorted(samples, key=sample_order)), settled=settled)


def record_split(dataset: PreparedDataset, folder: RunFolder) -> None:
    """Write the classes, and the label, split and SHA-256 of every image."""
    write_text(folder.classes, "".join(f"{name}\n" for name in dataset.classes))
    rows = [(path, *facts) for path, facts in describe_images(dataset, dataset.digests).items()]
    write_csv(folder.split, rows, SPLIT_COLUMNS)


def describe_data(dataset: Dataset) -> str:
    """Return one sentence: the labels, and images of each split."""
    splits: tuple[Split, ...] = ("train", "val", "test")
    parts = ", ".join(f"{len(dataset.of(split))} {split}" for split in splits if dataset.of(split))
    fewest, most = min(dataset.counts("train")), max(dataset.counts("train"))
    spread = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    images = "image" if spread == "1" else "images"
    what = dataset.target.describe([dataset.label_of(sample) for sample in dataset.samples])
    each = f"; {spread} training {images} a class" if dataset.target.has_classes else ""
    return f"{what}, {parts}{each}"


def check_outside(output: Path, dataset: Dataset) -> None:
    """Refuse to write among the images: nothing is ever written into the user's data.

    Raises:
        UsageError: the output is the data folder, or lies in it (in a folder with images, for a CSV file).
    """
    holders = {Path(sample.path).parts[0] for sample in dataset.samples if "/" in sample.path}
    inside = Path(os.path.realpath(output))
    tops = [dataset.root] if dataset.is_folder else [dataset.root / name for name in holders]
    if any(inside.is_relative_to(os.path.realpath(top)) for top in tops):
        fix = "Name an --output outside of it."
        raise UsageError(f"--output {output}", f"it lies in the data, {dataset.root}", fix)


def require_classes(dataset: Dataset, recipe: Recipe) -> None:
    """Refuse images without labels, and labels that are not one class an image.

    Raises:
        DataError: there are none, or they are sets of classes or numbers.
    """
    if dataset.target != SINGLE:
        found = f"has {dataset.target.describe([dataset.label_of(one) for one in dataset.samples])}"
        fix = "This works on one class an image: give a CSV with one class a row."
        raise DataError(f"--data {recipe.data.path}", found, fix)
    require_labels(dataset, recipe)


def require_labels(dataset: Dataset, recipe: Recipe) -> None:
    """Refuse images without labels.

    Raises:
        DataError: there are none.
    """
    if not dataset.is_labelled:
        found = "holds images but no class folders, so that no image has a label"
        fix = "Put the images of each class into a folder with the name of the class."
        raise DataError(f"--data {recipe.data.path}", found, fix)


def draw_evenly(dataset: PreparedDataset, most: int, seed: int) -> PreparedDataset:
    """Return the training images, or so many of them, drawn class by class (or range of numbers) in turns."""
    train = dataset.of("train")
    if len(train) <= most:
        return replace(dataset, samples=train)
    generator = torch.Generator().manual_seed(derive_seed(seed, "advise"))
    turns: list[tuple[int, int, str]] = []
    by_label: defaultdict[str, list[str]] = defaultdict(list)
    for sample in sorted(train, key=lambda sample: sample.label):
        by_label[dataset.label_of(sample)].append(sample.path)
    for number, own in enumerate(dataset.target.strata(by_label).values()):
        order = torch.randperm(len(own), generator=generator).tolist()
        turns += [(turn, number, own[place]) for turn, place in enumerate(order)]
    drawn = dict.fromkeys(path for _, _, path in sorted(turns))  # an image may be in several strata
    chosen = set(islice(drawn, most))
    return replace(dataset, samples=tuple(sample for sample in train if sample.path in chosen))


# --- Digests and final splits, for every command but ``run`` ---


def read_images(recipe: Recipe, dataset: Dataset, display: Display) -> PreparedDataset:
    """Take the digest of every image, and bring exact copies to one side of a draw, as a run does.

    Copies across given splits are reported: metrics on images that were trained on are optimistic.
    """
    checked = scan_images(dataset, display, "reading images", decode=False)
    if dataset.val_was_drawn and dataset.is_labelled:
        dataset = draw_copies_together(dataset, checked.digests, recipe, display)
    if shared := _count_shared(dataset, checked.digests):
        said = count(shared, "image lies", "images lie")
        display.warn(f"{said} in more than one split, byte for byte the same (`finetune check` names them).")
    return dataset.prepared(checked.digests, checked.bad, checked.find_value_range(dataset))


def _count_shared(dataset: Dataset, digests: Mapping[str, str]) -> int:
    """Return how many images lie in two splits or more."""
    splits: defaultdict[str, set[Split]] = defaultdict(set)
    for sample in dataset.samples:
        if sample.path in digests:
            splits[digests[sample.path]].add(sample.split)
    return sum(len(found) > 1 for found in splits.values())
