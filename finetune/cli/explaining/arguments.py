"""Arguments that the commands of ``finetune explain`` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ImagesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        help="Files, folders, CSV files with a column path, or patterns in quotes.", metavar="[IMAGE...]"
    ),
]
LayerOption = Annotated[
    str | None,
    typer.Option("--layer", "-l", help="A stage or a module (`finetune extract --layers list`)."),
]
ClassOption = Annotated[
    str | None,
    typer.Option("--class", help="The class to explain.", show_default="the predicted class of each image"),
]
OutputFolder = Annotated[Path, typer.Option("--output", "-o", help="A new folder.")]
