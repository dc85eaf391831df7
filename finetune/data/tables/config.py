"""How a table of images is read, where its own names do not say so."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from finetune.recipe import Recipe
from finetune.targets import TargetKind

NO_COLUMN = "none"
"""Value of ``split_column`` for a table without a column of splits."""


@dataclass(frozen=True)
class TableConfig:
    """How a table is read; None where its own names decide.

    Attributes:
        path_column: the column of the images' paths.
        label_column: the column of the labels.
        target: what the labels are.
        label_separator: what separates the labels of an image.
        split_column: the column of the splits; ``none`` if there is none.
        image_root: the folder that the paths are relative to; itself relative to the table's folder.
        suffix: ending of the files' names that the table leaves out, such as ``.jpg``.
    """

    path_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    image_root: str | None = None
    suffix: str = ""
    target: TargetKind | None = None
    label_separator: str | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """Return the configuration of a recipe."""
        data = recipe.data
        return cls(
            data.path_column,
            data.label_column,
            data.split_column,
            data.image_root,
            data.suffix or "",
            None if data.target == "auto" else data.target,
            data.label_separator,
        )

    def find_folder(self, folder: Path) -> Path:
        """Return the folder that the paths in a table in ``folder`` are relative to."""
        return folder / Path(self.image_root).expanduser() if self.image_root else folder


BY_NAMES = TableConfig()
"""A table whose own names decide."""


def find_table_root(folder: Path, table: TableConfig) -> Path:
    """Return the folder that a dataset's paths begin at: the table's own, or the images'.

    A folder of images that lies elsewhere is the beginning, since paths never lead upwards.
    """
    images = Path(os.path.normpath(table.find_folder(folder)))
    return folder if images.is_relative_to(os.path.normpath(folder)) else images
