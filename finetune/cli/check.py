"""``finetune check``: check a data set before a network is trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from finetune.cli.options import JsonOption, OutputOption
from finetune.cli.output import handled_errors, print_json, print_line, print_table
from finetune.errors import ExitCode, UsageError, count

_COLOURS = {"error": "red", "warning": "yellow", "note": None}
_SHOWN_PATHS = 6
"""Largest number of images printed of an issue; the file lists the others."""
_SHOWN = 20
"""Largest number of suspected labels printed; the file lists all."""


def check_command(
    data: Annotated[
        str | None,
        typer.Argument(help="A folder with train/ and val/, of class folders, a .zip, a CSV."),
    ] = None,
    data_option: Annotated[
        str | None, typer.Option("--data", "-d", help="The same, as the other commands take it.")
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
    channels: Annotated[
        str | None,
        typer.Option(
            help="Channels of the images, as for `finetune run`.", show_default="rgb", metavar="NAME|N"
        ),
    ] = None,
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
        if data is not None and data_option is not None:
            raise UsageError("finetune check", "it was given data twice", "Name them once.")
        data = data if data is not None else data_option
        if run is not None:
            if data is not None:
                raise UsageError("finetune check", "it was given data and a run", "Name one of the two.")
            others = {
                "--group-by": group_by,
                "--folds": folds,
                "--val-fraction": val_fraction,
                "--seed": seed,
                "--allow-leaks": allow_leaks or None,
                "--channels": channels,
                "--set": assignments,
            }
            if given := [name for name, value in others.items() if value is not None]:
                found = f"a run was named as well, which has its own split: {run}"
                raise UsageError(", ".join(given), found, "Drop one of the two.")
            _check_run(run, folder, as_json)
            return
        from finetune import api
        from finetune.data.discover import check_missing
        from finetune.recipe import parse_assignments

        settings = [*(assignments or []), *([f"input.channels={channels}"] if channels else [])]
        result = check_missing(data) or api.check(  # a wrong path is answered before torch is loaded
            data=data,
            group_by=group_by,
            folds=folds,
            val_fraction=val_fraction,
            allow_leaks=allow_leaks or None,
            seed=seed,
            settings=parse_assignments(settings),
            output=folder,
        )
        if as_json:
            print_json(result)
        else:
            _print(result, folder)
        if result["errors"]:
            raise typer.Exit(int(ExitCode.DATA))


def _print(result: dict[str, Any], folder: Path) -> None:
    """Print a paragraph per issue with its fix, then the counts and the path of the files."""
    from finetune.runs.folder import RunFolder

    for finding in result["findings"]:
        severity = finding["severity"]
        print_line(f"{severity}: ", colour=_COLOURS[severity], bold=True, end="")
        print_line(f"{finding['message']}\n  {finding['fix']} [{finding['code']}]")
        _print_paths(finding, RunFolder(folder).check)
    summary = result["summary"]
    if summary:
        _print_classes(summary)
        if folds := summary.get("folds"):
            names = list(next(iter(folds.values())))
            rows = [[fold, *map(str, counts.values())] for fold, counts in folds.items()]
            print_table(("fold", *names), rows)
    kinds = ("errors", "warnings", "notes")
    totals = ", ".join(f"{result[kind]} {kind[:-1] if result[kind] == 1 else kind}" for kind in kinds)
    written = f"; everything is in {folder}" if RunFolder(folder).check.is_file() else ""
    print_line(f"{totals}{written}")


def _print_paths(finding: dict[str, Any], file: Path) -> None:
    """Print the first images of an issue, unless its message names some, and where the others are listed."""
    paths = finding["paths"]
    if any(path in finding["message"] for path in paths):
        return
    width = 2 if finding["code"].startswith("near-") else 1  # near copies are listed in pairs
    for start in range(0, len(paths[:_SHOWN_PATHS]), width):
        print_line(f"    {' and '.join(paths[start : start + width])}")
    if more := len(paths[_SHOWN_PATHS:]):
        print_line(f"    and {more} more, in {file}")


def _print_classes(summary: dict[str, Any]) -> None:
    splits = summary["parts"]
    totals = ", ".join(f"{counts['num_images']} {split}" for split, counts in splits.items())
    limits = "{min:g} to {max:g}"
    images, classes = count(summary["num_images"], "image"), summary["labels"]
    print_line(
        f"{images} ({totals}), {classes}; "
        f"width {limits.format(**summary['width'])}, height {limits.format(**summary['height'])}"
        if summary["width"]["max"]
        else f"{images} ({totals}), {classes}"
    )


def _check_run(run: Path, folder: Path, as_json: bool) -> None:
    from finetune.runs.reader import require_run
    from finetune.system.display import Display
    from finetune.targets import METRIC_NAMES

    require_run(run)  # before torch is loaded
    display = Display()
    with display.busy("loading torch"):
        from finetune.evaluation.label_issues import find_run_label_issues
    found = find_run_label_issues(run, folder, display)
    if as_json:
        print_json(found.to_dict())
        return
    cells = [
        [f"{own:.3f}", label, f"{other:.3f}", suggested, path]
        for path, label, suggested, own, other, _ in found.rows[:_SHOWN]
    ]
    if cells:
        first, second = (name.split("_")[-1] for name in found.columns[3:5])
        print_table((first, "label", second, "suggested", "path"), cells)
    images = count(found.num_scored, "image")
    print_line(
        f"{count(len(found.rows), 'suspected label')} among {images} (linear classifiers that had "
        f"not seen them have the {METRIC_NAMES[found.metric]} {found.score:.3f}); everything is in {folder}"
    )
