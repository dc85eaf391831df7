"""``finetune compare``: compare runs on the same images, with a paired test for each pair."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli.options import JsonOption
from finetune.cli.output import handled_errors, print_json, print_line, print_table

if TYPE_CHECKING:
    from finetune.evaluation.compare_runs import ComparisonResult

_COLUMNS = (
    "run",
    "backbone",
    "strategy",
    "accuracy",
    "95 % interval",
    "balanced",
    "macro F1",
    "loss",
    "ECE",
    "seconds",
    "learned",
)


def compare_command(
    runs: Annotated[list[Path], typer.Argument(help="Folders of `finetune run` or `finetune evaluate`.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A new folder for tables and a plot.", show_default="none"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare runs on the images that all of them were tested on: a table, and a paired test for each pair.

    Up to four runs are compared pairwise; more are compared with the first one.
    """
    with handled_errors(as_json):
        from finetune import api

        result = api.compare(runs, output)
        if as_json:
            print_json(result.to_dict())
        else:
            _print(result)


def _print(result: ComparisonResult) -> None:
    print_table(_COLUMNS, [_cells(row) for row in result.rows])
    print_line()
    for pair in result.pairs:
        print_line(f"{pair.sentence}, on {pair.num_images} images")


def _cells(row: Mapping[str, Any]) -> list[str]:
    low, high = row["accuracy_low"], row["accuracy_high"]
    interval = "-" if low is None or high is None else f"{low:.3f} to {high:.3f}"
    metrics = [_number(row[key], ".4f") for key in ("balanced_accuracy", "f1_macro", "loss", "ece")]
    solved = " (solved)" if row["solved_on"] else ""
    names = [str(row["run"]), str(row["backbone"] or "-"), f"{row['strategy'] or '-'}{solved}"]
    return [*names, _number(row["accuracy"], ".4f"), interval, *metrics, *_costs(row)]


def _costs(row: Mapping[str, Any]) -> list[str]:
    return [_number(row["seconds"], ".0f"), _number(row["learned"], ",")]


def _number(value: Any, format_spec: str) -> str:
    return "-" if value is None else format(value, format_spec)
