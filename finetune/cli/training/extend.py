"""``finetune extend``: a run on its own images and on more of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.options import JsonOption
from finetune.cli.output import handled_errors, print_json, print_line, print_table


def extend_command(
    run: Annotated[Path, typer.Argument(help="A finished run.", metavar="RUN")],
    data: Annotated[
        str, typer.Option("--data", "-d", help="More images, in any layout that `finetune run` reads.")
    ],
    replace: Annotated[
        bool,
        typer.Option(
            "--replace", help="These are all images: leave out those of the run that are not among them."
        ),
    ] = False,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", help="Another key of the recipe.", metavar="SECTION.KEY=VALUE"),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Number of epochs of a trained network.", show_default="the run's own")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Decoding processes.", show_default="auto")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the new run.", show_default="runs/<time>-extend"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Add images or classes to a run: features of known images are kept, and what is forgotten is shown."""
    with handled_errors(as_json):
        from finetune import api
        from finetune.recipe import parse_assignments

        settings = parse_assignments(assignments or [])
        settings |= {} if epochs is None else {"training.epochs": epochs}
        settings |= {} if workers is None else {"data.workers": workers}
        done = api.extend(run, data, replace=replace, settings=settings | {"device": device}, output=output)
        if as_json:
            print_json(done.to_dict())
        elif done.forgetting is not None:
            rows = [[*map(str, row[:4])] for row in done.forgetting.rows]
            print_table(("class", "images", "before", "now"), rows)
            print_line(done.forgetting.sentence)
