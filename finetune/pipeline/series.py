"""Several runs that differ in one thing, their seed or their fold: a mean, and how far they lie apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from finetune.errors import UsageError
from finetune.runs.claim import create_folder
from finetune.runs.files import write_csv, write_json
from finetune.runs.folder import RunFolder
from finetune.system.display import Display
from finetune.targets import SERIES_METRICS

_KIND = {"repeats": "seed", "folds": "fold"}


def create_series_folder(output: Path) -> None:
    """Create the folder that holds the runs of a series.

    Raises:
        UsageError: it holds a single run.
        DiskError: it cannot be created.
    """
    if RunFolder(output).recipe.exists():
        fix = "Name a new folder: each run of a series gets a folder of its own in it."
        raise UsageError(f"--output {output}", "it holds a single run", fix)
    create_folder(output)
    for old in (output / "series.json", output / "series.csv"):  # of runs that may be made longer now
        old.unlink(missing_ok=True)


def finish_series(output: Path, kind: str, runs: Mapping[str, Mapping[str, Any]], display: Display) -> Any:
    """Write ``series.json`` and ``series.csv``, and say what the runs gave together.

    Args:
        output: the folder of the series.
        kind: ``repeats`` or ``folds``.
        runs: content of each ``metrics.json``, by the name of its folder; at least two.
        display: is told the mean.

    Returns:
        The content of ``series.json``.
    """
    figures = [name for name in SERIES_METRICS if all(run.get(name) is not None for run in runs.values())]
    columns = ("run", *figures, "best_epoch", "seconds")
    rows = [
        (name, *(run[key] for key in figures), run["best_epoch"], run["seconds"]["total"])
        for name, run in runs.items()
    ]
    summary = summarize(figures, list(runs.values()))
    series = {"kind": kind, "output": str(output), **summary}
    series["runs"] = [dict(zip(columns, row, strict=True)) for row in rows]
    write_csv(output / "series.csv", rows, columns)
    write_json(output / "series.json", series)
    cells = [[name, *(f"{run[key]:.4f}" for key in figures)] for name, run in runs.items()]
    display.table(("run", *figures), cells, numbers=figures)
    display.say(_sentence(kind, series), style="bold")
    return series


def summarize(figures: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean and standard deviation (of a single run, n - 1) of some figures."""
    values = {name: [float(run[name]) for run in runs] for name in figures}
    return {
        "num_runs": len(runs),
        "split": runs[0]["split"],
        "split_chose_checkpoint": any(run["split_chose_checkpoint"] for run in runs),
        "mean": {name: fmean(own) for name, own in values.items()},
        "std": {name: stdev(own) for name, own in values.items()},
    }


def _sentence(kind: str, series: Mapping[str, Any]) -> str:
    number, spread = series["num_runs"], series["std"]["accuracy"]
    # Folds share most of their training images: their deviation says less of the mean.
    of_mean = f"; of the mean {spread / math.sqrt(number):.4f}" if kind == "repeats" else ""
    kindly = " (images that also chose the epoch)" if series["split_chose_checkpoint"] else ""
    return (
        f"accuracy {series['mean']['accuracy']:.4f} +/- {spread:.4f} (mean and standard deviation of "
        f"{number} {_KIND[kind]}s{of_mean}) on {series['split']}{kindly}"
    )
