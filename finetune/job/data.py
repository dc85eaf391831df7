"""The data of a run: every image looked at, the unreadable listed, the split recorded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from finetune.data.check import BadImage, Checked, check_bad
from finetune.data.sample import SPLITS, Dataset, Sample, Split
from finetune.data.samples import is_sample
from finetune.data.split import SplitConfig, keep_copies_together
from finetune.display import Display
from finetune.errors import DataError, UsageError
from finetune.job.same import describe_images
from finetune.preflight.files import UNREADABLE
from finetune.preflight.report import inspect
from finetune.recipe import Recipe, load_recipe
from finetune.recipe.schema import DataSettings
from finetune.runs.bad_images import read_bad_images, write_bad_images
from finetune.runs.claim import create_folder, read_split
from finetune.runs.files import write_csv, write_json, write_text
from finetune.runs.folder import RunFolder
from finetune.runtime import derive_seed

SHOWN = 5
"""Findings of the preflight that a run shows."""


def check_data(
    dataset: Dataset, checked: Checked, folder: RunFolder, display: Display, recipe: Recipe
) -> Dataset:
    """Return the images that can be used: all but a few, or a refusal of what cannot be stood behind.

    Images that an earlier attempt lost on its way keep their places: they stay lost, and every epoch keeps
    its order.
    """
    if dataset.val_was_drawn:
        dataset = draw_copies_together(dataset, checked.digests, recipe, display)
    _look_over(dataset, checked, folder, display, recipe.data)
    for image in checked.bad[:10]:
        display.warn(f"{image.path} cannot be read: {image.reason}")
    lost = _lost_before(dataset, checked, folder)
    bad = [image for image in checked.bad if image.path not in lost]
    listed = [*bad, *(image for image, _ in lost.values())]
    write_bad_images(folder, [(image.path, image.split, image.reason) for image in listed])
    usable = check_bad(dataset.without(lost), bad)
    samples = sorted([*usable.samples, *(sample for _, sample in lost.values())], key=_place)
    return replace(usable, samples=tuple(samples))


def draw_copies_together(
    dataset: Dataset, digests: Mapping[str, str], recipe: Recipe, display: Display
) -> Dataset:
    """Return a drawn data set in which no picture is both trained on and judged, and say what moved."""
    dataset, moved = keep_copies_together(dataset, digests, SplitConfig.of(recipe))
    if moved:
        images = "1 image" if moved == 1 else f"{moved} images"
        display.say(f"exact copies stay in one part: {images} moved between train and val")
    return dataset


def _look_over(
    dataset: Dataset, checked: Checked, folder: RunFolder, display: Display, settings: DataSettings
) -> None:
    """Write ``check.json``, say what stands out, and refuse exact copies in two parts.

    Raises:
        DataError: there are some, and they are not allowed.
    """
    report = inspect(dataset, checked, settings.allow_leaks, dataset.remarks)
    write_json(folder.check, report.to_dict())
    said = {remark.message for remark in dataset.remarks}
    news = [one for one in report.remarks if one.severity != "note" and one.message not in said]
    # A sample is as small as it is; nobody has larger originals of it.
    known = {*UNREADABLE, "picture-small"} if is_sample(settings.path or "") else {*UNREADABLE}
    news = [one for one in news if one.code not in known]
    for remark in news[:SHOWN]:
        display.warn(remark.message)
    if len(news) > SHOWN:
        display.say(f"and {len(news) - SHOWN} findings more, in {folder.check}")
    leaks = [remark for remark in report.errors if remark.code == "leak"]
    if leaks:
        shown = "".join(f"\n  {path}" for path in leaks[0].paths[:SHOWN])
        found = f"{' '.join(remark.message for remark in leaks)} Among them:{shown}"
        raise DataError(f"data in {dataset.root}", found, leaks[0].fix)


def _lost_before(dataset: Dataset, checked: Checked, folder: RunFolder) -> dict[str, tuple[BadImage, Sample]]:
    """Return the training images that an earlier attempt began with and lost, and that are still lost."""
    began = {row["path"]: row["label"] for row in read_split(folder)}
    return {
        row["path"]: (
            BadImage(row["path"], "train", row["reason"]),
            Sample(row["path"], dataset.classes.index(began[row["path"]]), "train"),
        )
        for row in read_bad_images(folder)
        if began.get(row["path"]) in dataset.classes and row["path"] not in checked.digests
    }


def _place(sample: Sample) -> tuple[int, str]:
    return SPLITS.index(sample.split), sample.path


def keep_split(dataset: Dataset, folder: RunFolder, recipe: Recipe) -> Dataset:
    """Return the data set with the parts that an earlier attempt drew, if it was to draw the same.

    Where the data name no validation part, it is drawn from what is there; an image that has vanished since
    would change the draw.
    """
    if not dataset.val_was_drawn or not folder.recipe.exists():
        return dataset
    if SplitConfig.of(load_recipe(str(folder.recipe))) != SplitConfig.of(recipe):
        return dataset
    rows = [(row.get("path"), row.get("split")) for row in read_split(folder)]
    drawn = {path: split for path, part in rows for split in SPLITS if split == part}
    samples = [replace(sample, split=drawn.get(sample.path, sample.split)) for sample in dataset.samples]
    settled = frozenset(sample.path for sample in samples if sample.path in drawn)
    return replace(dataset, samples=tuple(sorted(samples, key=_place)), settled=settled)


def record_split(dataset: Dataset, digests: dict[str, str], folder: RunFolder) -> None:
    """Write which image is in which class and part, and what it held."""
    write_text(folder.classes, "".join(f"{name}\n" for name in dataset.classes))
    rows = [(path, *facts) for path, facts in describe_images(dataset, digests).items()]
    write_csv(folder.split, rows, ("path", "label", "split", "sha256"))


def describe_data(dataset: Dataset) -> str:
    """Return one sentence: classes, and images of each part."""
    splits: tuple[Split, ...] = ("train", "val", "test")
    parts = ", ".join(f"{len(dataset.of(split))} {split}" for split in splits if dataset.of(split))
    fewest, most = min(dataset.counts("train")), max(dataset.counts("train"))
    spread = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return f"{dataset.num_classes} classes, {parts}; {spread} training images a class"


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


def create_new_folder(path: Path) -> None:
    """Create a folder for results, where there is none or an empty one.

    Raises:
        UsageError: something is there already.
        DiskError: it cannot be created.
    """
    if path.is_dir() and any(path.iterdir()):
        raise UsageError(f"--output {path}", "the folder is not empty", "Name a new folder.")
    create_folder(path)


def require_labels(dataset: Dataset, recipe: Recipe) -> None:
    """Refuse images without labels.

    Raises:
        DataError: there are none.
    """
    if not dataset.is_labelled:
        found = "holds images but no class folders, so that no image has a label"
        fix = "Put the images of each class into a folder with the name of the class."
        raise DataError(f"--data {recipe.data.path}", found, fix)


def draw_evenly(dataset: Dataset, most: int, seed: int) -> Dataset:
    """Return the training images, or so many of them, drawn class by class in turns."""
    train = dataset.of("train")
    if len(train) <= most:
        return replace(dataset, samples=train)
    generator = torch.Generator().manual_seed(derive_seed(seed, "advise"))
    turns: list[tuple[int, int, Sample]] = []
    for label in range(dataset.num_classes):
        own = [sample for sample in train if sample.label == label]
        order = torch.randperm(len(own), generator=generator).tolist()
        turns += [(turn, label, own[place]) for turn, place in enumerate(order)]
    chosen = {sample.path for _, _, sample in sorted(turns, key=lambda one: one[:2])[:most]}
    return replace(dataset, samples=tuple(sample for sample in train if sample.path in chosen))
