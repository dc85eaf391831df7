"""``bad_images.csv``: images that could not be read when the run started, or were lost during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from finetune.runs.files import write_csv
from finetune.runs.folder import RunFolder
from finetune.runs.reader import BAD_IMAGES_COLUMNS, RunReader


def write_bad_images(folder: RunFolder, rows: Sequence[tuple[str, str, str]]) -> None:
    """Write path, split and reason of each bad image; remove the file if there are none."""
    if rows:
        write_csv(folder.bad_images, rows, BAD_IMAGES_COLUMNS)
    else:
        folder.bad_images.unlink(missing_ok=True)  # an earlier attempt may have written it


def add_lost_images(folder: RunFolder, lost: Mapping[str, str]) -> None:
    """Add training images that were lost during training, given as reasons by path, to the list."""
    rows = [tuple(row.values()) for row in RunReader(folder).bad_images if row["path"] not in lost]
    rows += [(path, "train", reason) for path, reason in lost.items()]
    write_csv(folder.bad_images, rows, BAD_IMAGES_COLUMNS)
