"""The data of a run: every image looked at, the unreadable listed, the split recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from finetune.data.check import BadImage, check_bad, check_images
from finetune.data.sample import Dataset, Split
from finetune.display import Display
from finetune.job.same import describe_images
from finetune.runs.claim import read_bad_images
from finetune.runs.files import write_csv, write_text
from finetune.runs.folder import RunFolder

BAD_IMAGE_COLUMNS = ("path", "split", "reason")


def read_digests(dataset: Dataset, display: Display) -> dict[str, str]:
    """Return the sha256 of every file, by path."""
    with display.track("comparing images", len(dataset.samples)) as advance:
        return check_images(dataset, on_progress=lambda _: advance(1, ""), decode=False).digests


def check_data(dataset: Dataset, folder: RunFolder, display: Display) -> tuple[Dataset, dict[str, str]]:
    """Decode every image once, and refuse what cannot be stood behind.

    Returns:
        The data set without unreadable images, and the sha256 of each file.
    """
    for warning in dataset.warnings:
        display.warn(warning)
    with display.track("checking images", len(dataset.samples)) as advance:
        checked = check_images(dataset, on_progress=lambda _: advance(1, ""))
    for image in checked.bad[:10]:
        display.warn(f"{image.path} cannot be read: {image.reason}")
    _write_bad_images(folder, checked.bad)
    return check_bad(dataset, checked.bad), checked.digests


def _write_bad_images(folder: RunFolder, bad: Sequence[BadImage]) -> None:
    rows = [(image.path, image.split, image.reason) for image in bad]
    if rows:
        write_csv(folder.bad_images, rows, BAD_IMAGE_COLUMNS)
    else:
        folder.bad_images.unlink(missing_ok=True)  # of an attempt before they were mended


def add_lost_images(folder: RunFolder, lost: Mapping[str, str]) -> None:
    """List training images that vanished while training went on, after those that were bad before."""
    rows = [tuple(row.values()) for row in read_bad_images(folder) if row["path"] not in lost]
    rows += [(path, "train", reason) for path, reason in lost.items()]
    write_csv(folder.bad_images, rows, BAD_IMAGE_COLUMNS)


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
