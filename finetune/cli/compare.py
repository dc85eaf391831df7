"""``finetune compare``: compare runs on the same images, with a paired test for each pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli.options import JsonOption
from finetune.cli.output import handled_errors, print_json, print_line, print_table
from finetune.targets import METRIC_NAMES

if TYPE_CHECKING:
    from finetune.evaluation.compare_runs import ComparisonResult

_TITLES = {
    "balanced_accuracy": "balanced",
    "f1_micro": "micro F1",
    "f1_macro": "macro F1",
    "loss": "loss",
    "ece": "ECE",
    "spearman": "rank correlation",
    "mae": "mean absolute error",
}
"""Headings of metrics beside the score."""
_COSTS = ("seconds", "learned")


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
    score = result.metric
    details = [name for name in result.rows[0] if name in _TITLES]
    titles = [_TITLES[name] for name in details]
    columns = ("run", "backbone", "strategy", METRIC_NAMES[score], "95 % interval", *titles, *_COSTS)
    print_table(columns, [_cells(row, score, details) for row in result.rows])
    print_line()
    for pair in result.pairs:
        print_line(f"{pair.sentence}, on {pair.num_images} images")


def _cells(row: Mapping[str, Any], score: str, details: Sequence[str]) -> list[str]:
    low, high = row[f"{score}_low"], row[f"{score}_high"]
    interval = "-" if low is None or high is None else f"{low:.3f} to {high:.3f}"
    metrics = [_number(row[key], ".4f") for key in details]
    solved = " (solved)" if row["solved_on"] else ""
    names = [str(row["run"]), str(row["backbone"] or "-"), f"{row['strategy'] or '-'}{solved}"]
    return [*names, _number(row[score], ".4f"), interval, *metrics, *_costs(row)]


def _costs(row: Mapping[str, Any]) -> list[str]:
    return [_number(row["seconds"], ".0f"), _number(row["learned"], ",")]


def _number(value: Any, format_spec: str) -> str:
    return "-" if value is None else format(value, format_spec)
