"""``finetune export`` and ``finetune push``: export a model, or upload it to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.options import JsonOption
from finetune.cli.output import handled_errors, print_json, print_line

RunArgument = Annotated[Path, typer.Argument(help="A finished run, or a model folder.", metavar="RUN")]


def export_command(
    run: RunArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder.")],
    format: Annotated[str, typer.Option("--format", help="timm, onnx or torch-export.")] = "timm",
    layout: Annotated[
        str | None,
        typer.Option(
            "--with-preprocessing",
            help="The graph takes uint8 RGB images of the network's size, and normalises them.",
            metavar="nchw|nhwc",
            show_default="float32, normalised before",
        ),
    ] = None,
    with_probabilities: Annotated[
        bool,
        typer.Option("--with-softmax", help="The graph returns calibrated probabilities instead of logits."),
    ] = False,
    opset: Annotated[
        int | None, typer.Option("--opset", help="ONNX opset, 18 to 23.", show_default="18")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Export a model, and verify in a fresh process that it gives the run's predictions."""
    with handled_errors(as_json):
        from finetune import api

        report = api.export(
            run, output, format=format, preprocessing=layout, probabilities=with_probabilities, opset=opset
        )
        if as_json:
            print_json(report | {"output": str(output)})


def push_command(
    run: RunArgument,
    repo_id: Annotated[str, typer.Argument(help="ORG/NAME; created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Export a model in timm's format, verify it, and upload it to the Hugging Face hub."""
    from dataclasses import asdict

    from finetune.system.display import Display

    with handled_errors(as_json):
        display = Display()
        with display.busy("loading torch"):
            from finetune.exporters.export import push
        pushed = push(run, repo_id, private, display)
        display.say(f"pushed {pushed.repo_id}, commit {pushed.commit[:12]}")
        if as_json:
            print_json(asdict(pushed))
        else:
            print_line(pushed.url)
