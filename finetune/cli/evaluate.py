"""``finetune evaluate``: metrics of finished models on labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.options import JsonOption, OutputOption
from finetune.cli.output import handled_errors, print_json
from finetune.errors import UsageError


def evaluate_command(
    models: Annotated[
        list[str],
        typer.Argument(help="A run, a model folder, a name; several form an ensemble.", metavar="MODEL..."),
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            "-d",
            help="A folder of class folders, with or without splits, a .zip, a CSV.",
            show_default="the run's own",
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="train, val, test or all.", show_default="test, else val, else all")
    ] = None,
    crops: Annotated[int, typer.Option(help="1, 5 or 10 crops of each image.")] = 1,
    scales: Annotated[
        str | None, typer.Option(help="Short sides in pixels, comma-separated: 256,288.")
    ] = None,
    output: OutputOption = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Batch size.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Decoding threads.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    offline: Annotated[bool, typer.Option("--offline", help="Never ask the network.")] = False,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Read images through links that lead out of the folder.")
    ] = False,
    allow_leaks: Annotated[
        bool, typer.Option("--allow-leaks", help="Also test on images that the model was trained on.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Test finished models: metrics with intervals, calibration, a report.

    Several models form an ensemble; several crops and scales are averaged. Gain and cost of each are shown.
    """
    with handled_errors(as_json):
        from finetune import api

        metrics = api.evaluate(
            models,
            data=data,
            split=split,
            crops=crops,
            scales=_read_scales(scales),
            output=output,
            device=device,
            batch_size=batch_size,
            workers=workers,
            offline=offline,
            follow_links=follow_links,
            allow_leaks=allow_leaks,
        )
        if as_json:
            print_json(metrics)


def _read_scales(text: str | None) -> tuple[int, ...]:
    from finetune.recipe.flags import split_words

    sides = split_words(text or "")
    if not all(side.isdecimal() and len(side) < 6 for side in sides):
        raise UsageError(f"--scales {text}", "these are not numbers of pixels", "Take --scales 256,288.")
    return tuple(map(int, sides))
