"""Images that a run could not read: known from the start, or lost on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from finetune.runs.files import write_csv
from finetune.runs.folder import RunFolder
from finetune.runs.reader import BAD_IMAGES_COLUMNS, RunReader


def write_bad_images(folder: RunFolder, rows: Sequence[tuple[str, str, str]]) -> None:
    """Write path, part and reason of each; no file where there are none."""
    if rows:
        write_csv(folder.bad_images, rows, BAD_IMAGES_COLUMNS)
    else:
        folder.bad_images.unlink(missing_ok=True)  # of an attempt before they were mended


def add_lost_images(folder: RunFolder, lost: Mapping[str, str]) -> None:
    """List training images that vanished while training went on, after those that were bad before."""
    rows = [tuple(row.values()) for row in RunReader(folder).bad_images if row["path"] not in lost]
    rows += [(path, "train", reason) for path, reason in lost.items()]
    write_csv(folder.bad_images, rows, BAD_IMAGES_COLUMNS)
