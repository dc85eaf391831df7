"""Images that a run could not read: known from the start, or lost on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from finetune.runs.files import read_rows, write_csv
from finetune.runs.folder import RunFolder

COLUMNS = ("path", "split", "reason")


def read_bad_images(folder: RunFolder) -> list[dict[str, str]]:
    """Return path, part and reason of each.

    Raises:
        DataError: the file is damaged.
    """
    return read_rows(folder.bad_images, COLUMNS) if folder.bad_images.exists() else []


def write_bad_images(folder: RunFolder, rows: Sequence[tuple[str, str, str]]) -> None:
    """Write path, part and reason of each; no file where there are none."""
    if rows:
        write_csv(folder.bad_images, rows, COLUMNS)
    else:
        folder.bad_images.unlink(missing_ok=True)  # of an attempt before they were mended


def add_lost_images(folder: RunFolder, lost: Mapping[str, str]) -> None:
    """List training images that vanished while training went on, after those that were bad before."""
    rows = [tuple(row.values()) for row in read_bad_images(folder) if row["path"] not in lost]
    rows += [(path, "train", reason) for path, reason in lost.items()]
    write_csv(folder.bad_images, rows, COLUMNS)
