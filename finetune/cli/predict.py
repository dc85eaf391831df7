"""``finetune predict``: write the labels and probabilities of any number of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.options import JsonOption
from finetune.cli.output import handled_errors, print_json
from finetune.cli.processes import GpusOption, ProcessesOption, joined_processes, start_processes


def predict_command(
    model: Annotated[str, typer.Argument(help="A finished run, an exported folder, or a name with weights.")],
    input: Annotated[
        str,
        typer.Argument(
            help="A file, a folder, a CSV with a column path, a pattern in quotes, or - for stdin."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .csv, .jsonl or .parquet file.")],
    format: Annotated[
        str | None,
        typer.Option("--format", help="csv, jsonl or parquet.", show_default="the output's suffix, else csv"),
    ] = None,
    top: Annotated[
        int, typer.Option("--top", min=1, help="Number of classes to list, the most probable first.")
    ] = 1,
    reject_below: Annotated[
        float | None,
        typer.Option(
            "--reject-below", min=0, max=1, help="Leave the label empty below this confidence.", metavar="P"
        ),
    ] = None,
    crops: Annotated[
        int,
        typer.Option(
            "--crops", help="1, 5 or 10 crops of each image, averaged; N crops take N times as long."
        ),
    ] = 1,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Batch size.", show_default="32; GPU 128")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Decoding threads.", show_default="cores")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    nul: Annotated[bool, typer.Option("-0", "--null", help="Paths on stdin end with a zero byte.")] = False,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Read images through links that lead out of the folder.")
    ] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never ask the network.")] = False,
    gpus: GpusOption = None,
    processes: ProcessesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Predict any number of images with a trained network: path, label, confidence, probabilities.

    The same command resumes an interrupted prediction.
    """
    with handled_errors(as_json):
        start_processes(processes, gpus, device)
        device = "cuda" if gpus else device
        with joined_processes(device, 0, as_json) as distributed:
            from finetune import api
            from finetune.system.display import Display, SilentDisplay

            display = Display() if distributed.is_main else SilentDisplay()
            done = api.predict(
                model,
                input,
                output,
                format=format,
                top=top,
                reject_below=reject_below,
                crops=crops,
                batch_size=batch_size,
                workers=workers,
                device=device,
                null=nul,
                follow_links=follow_links,
                offline=offline,
                display=display,
                distributed=distributed,
            )
            if as_json and distributed.is_main:
                print_json(done)
