"""The folder that the paths of a dataset are relative to, found again after a run."""

from __future__ import annotations

import os
from pathlib import Path

from finetune.data.archives.archive import find_split_archives, open_archive, open_split_archives
from finetune.data.archives.entries import is_archive
from finetune.data.layout import LayoutReader, printable
from finetune.data.samples import is_sample, open_sample
from finetune.data.tables.config import BY_NAMES, TableConfig, find_table_root


def find_root(data: Path, table: TableConfig = BY_NAMES) -> Path | None:
    """Return the folder that the paths of a dataset are relative to; None if it no longer exists.

    Args:
        data: the folder, CSV file, archive or sample that the user named.
        table: how a CSV file was read.

    Raises:
        DataError: the archive can no longer be unpacked.
        UsageError: there is no sample of this name.
    """
    if is_sample(data):
        return open_sample(data)
    reader = LayoutReader(f"--data {printable(data)}", data.absolute())
    if os.path.isdir(data):  # noqa: PTH112 (Path.is_dir raises below a closed folder)
        packed = find_split_archives(data)
        return open_split_archives(reader, packed) if packed else data
    if not os.path.isfile(data):  # noqa: PTH113
        return None
    return open_archive(reader, data) if is_archive(data.name) else find_table_root(data.parent, table)
