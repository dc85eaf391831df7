"""``finetune check``: check a data set before a network is trained on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune.cli.options import JsonOption, OutputOption
from finetune.cli.output import handled_errors, print_table, write_stdout
from finetune.errors import ExitCode, UsageError, sanitize

_COLOURS = {"error": "red", "warning": "yellow", "note": None}
_SHOWN = 20
"""Largest number of suspected labels printed; the file lists all."""


def check_command(
    data: Annotated[
        str | None,
        typer.Argument(help="A folder with train/ and val/, of class folders, a .zip, a CSV."),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option("--run", help="Look for wrong labels among the images of this run instead."),
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(
            help="Images of one group (a patient, a video): a column of the CSV, or a pattern in the path.",
            metavar="COLUMN|REGEX",
        ),
    ] = None,
    folds: Annotated[
        int | None, typer.Option(min=2, help="Split the images into folds, and write folds.csv.")
    ] = None,
    val_fraction: Annotated[
        float | None,
        typer.Option(help="Share of each class kept for validation if there is no val/.", show_default="0.2"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed of the split.", show_default="0")] = None,
    allow_leaks: Annotated[
        bool, typer.Option("--allow-leaks", help="Exact copies in two splits are only a warning.")
    ] = False,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Another key of the recipe; may be repeated.", metavar="SECTION.KEY=VALUE"
        ),
    ] = None,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read every image, and list what would make the metrics misleading: check.json, check.png.

    The exit code is 0 when a run would accept the data, and 65 when it would not.
    """
    with handled_errors(as_json):
        from finetune.runs.folder import default_folder

        folder = output or default_folder("check")
        if run is not None:
            if data is not None:
                raise UsageError("finetune check", "it was given data and a run", "Name one of the two.")
            others = {
                "--group-by": group_by,
                "--folds": folds,
                "--val-fraction": val_fraction,
                "--seed": seed,
                "--allow-leaks": allow_leaks or None,
                "--set": assignments,
            }
            if given := [name for name, value in others.items() if value is not None]:
                found = f"a run was named as well, which has its own split: {run}"
                raise UsageError(", ".join(given), found, "Drop one of the two.")
            _check_run(run, folder, as_json)
            return
        from finetune import api
        from finetune.recipe import parse_assignments

        result = api.check(
            data=data,
            group_by=group_by,
            folds=folds,
            val_fraction=val_fraction,
            allow_leaks=allow_leaks or None,
            seed=seed,
            settings=parse_assignments(assignments or []),
            output=folder,
        )
        if as_json:
            write_stdout(json.dumps(result) + "\n")
        else:
            _print(result, folder)
        if result["errors"]:
            raise typer.Exit(int(ExitCode.DATA))


def _print(result: dict[str, Any], folder: Path) -> None:
    """Print a paragraph per issue with its fix, then the counts and the path of the files."""
    for finding in result["findings"]:
        severity = finding["severity"]
        typer.echo(typer.style(f"{severity}: ", fg=_COLOURS[severity], bold=True), nl=False)
        typer.echo(f"{sanitize(finding['message'])}\n  {sanitize(finding['fix'])} [{finding['code']}]")
    summary = result["summary"]
    if summary:
        _print_classes(summary)
        if folds := summary.get("folds"):
            names = list(next(iter(folds.values())))
            rows = [[fold, *map(str, counts.values())] for fold, counts in folds.items()]
            print_table(("fold", *names), rows)
    totals = ", ".join(f"{result[kind]} {kind}" for kind in ("errors", "warnings", "notes"))
    typer.echo(f"{totals}; everything is in {folder}")


def _print_classes(summary: dict[str, Any]) -> None:
    splits = summary["parts"]
    totals = ", ".join(f"{counts['num_images']} {split}" for split, counts in splits.items())
    limits = "{min:g} to {max:g}"
    typer.echo(
        f"{summary['num_images']} images ({totals}), {summary['num_classes']} classes; "
        f"width {limits.format(**summary['width'])}, height {limits.format(**summary['height'])}"
        if summary["width"]["max"]
        else f"{summary['num_images']} images ({totals}), {summary['num_classes']} classes"
    )


def _check_run(run: Path, folder: Path, as_json: bool) -> None:
    from finetune.system.display import Display

    display = Display()
    with display.busy("loading torch"):
        from finetune.evaluation.label_issues import find_run_label_issues
    found = find_run_label_issues(run, folder, display)
    if as_json:
        write_stdout(json.dumps(found.to_dict()) + "\n")
        return
    cells = [
        [f"{own:.3f}", label, f"{other:.3f}", suggested, path]
        for path, label, suggested, own, other, _ in found.rows[:_SHOWN]
    ]
    if cells:
        print_table(("prob.", "label", "prob.", "suggested", "path"), cells)
    typer.echo(
        f"{len(found.rows)} suspected labels among {found.num_scored} images (linear classifiers that had "
        f"not seen them agree with {100 * found.accuracy:.1f} % of the labels); everything is in {folder}"
    )
