"""Compare names of columns as people write them: any case, with or without separators."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from finetune.data.layout import LayoutReader, some
from finetune.data.tables.config import NO_COLUMN, TableConfig
from finetune.errors import suggest

_SEPARATORS = re.compile(r"[\W_]+")


def plain(name: str) -> str:
    """Return a name in lower case and without separators: ``Image_ID`` is ``imageid``."""
    return _SEPARATORS.sub("", name.casefold())


def find_named(reader: LayoutReader, header: Sequence[str], name: str, key: str) -> int:
    """Return the number of the column that a recipe names.

    Raises:
        DataError: there is no such column, or there are several.
    """
    for same in (str, str.casefold, plain):
        numbers = [number for number, column in enumerate(header) if same(column) == same(name)]
        if len(numbers) == 1:
            return numbers[0]
        if numbers:
            raise reader.error(f"has more than one column {name!r}", "Keep one of them.")
    raise reader.error(
        f"has no column {name!r} (columns: {some(header)}{suggest(name, header)})",
        f"Correct --set data.{key}={name}.",
    )


def keep_fitting(table: TableConfig, header: Sequence[str], folder: Path) -> TableConfig:
    """Return what a training table's configuration says of another table in ``folder``.

    Columns that the other table lacks, and a folder of images that is not there, are left out.
    """
    known = {plain(name) for name in header} | {plain(NO_COLUMN)}

    def keep(name: str | None) -> str | None:
        return name if name is not None and plain(name) in known else None

    root = table.image_root if table.find_folder(folder).is_dir() else None
    return replace(
        table,
        path_column=keep(table.path_column),
        label_column=keep(table.label_column),
        split_column=keep(table.split_column),
        image_root=root,
    )
