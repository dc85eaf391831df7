"""Summary of several runs that differ only in seed or fold: mean and standard deviation of their metrics."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from finetune.errors import UsageError
from finetune.runs.claim import check_name, create_folder
from finetune.runs.files import write_csv, write_json
from finetune.runs.folder import RunFolder
from finetune.system.display import Display
from finetune.targets import METRIC_NAMES, SCORES, SERIES_METRICS

_KIND = {"repeats": "seed", "folds": "fold"}


_SUMMARIES = ("series.json", "series.csv")


def create_series_folder(output: Path, names: Collection[str]) -> None:
    """Create the folder that holds the runs of a series.

    Args:
        output: the folder: new, empty, or that of the same series, which may have had fewer runs.
        names: names of the runs.

    Raises:
        UsageError: it holds a single run, or files that are not of a series.
        DiskError: it cannot be created.
    """
    check_name(output)
    if RunFolder(output).recipe.exists():
        fix = "Name a new folder: it will hold one folder for each run of the series."
        raise UsageError(f"--output {output}", "it holds a single run", fix)
    create_folder(output)
    entries = {entry.name for entry in output.iterdir()}
    others = sorted(entries - {*_SUMMARIES} - {*names})
    others = [name for name in others if not RunFolder(output / name).recipe.exists()]
    if others or (entries and entries <= {*_SUMMARIES}):
        found = f"the folder holds other files ({', '.join((others or sorted(entries))[:3])})"
        raise UsageError(f"--output {output}", found, "Name a new folder.")
    for name in _SUMMARIES:  # stale if the runs are extended
        (output / name).unlink(missing_ok=True)


def finish_series(output: Path, kind: str, runs: Mapping[str, Mapping[str, Any]], display: Display) -> Any:
    """Write ``series.json`` and ``series.csv``, and report the mean.

    Args:
        output: folder of the series.
        kind: ``repeats`` or ``folds``.
        runs: content of each ``metrics.json`` by folder name; at least two.
        display: display that shows the table and the mean.

    Returns:
        The content of ``series.json``.
    """
    metrics = [name for name in SERIES_METRICS if all(run.get(name) is not None for run in runs.values())]
    columns = ("run", *metrics, "best_epoch", "seconds")
    rows = [
        (name, *(run[key] for key in metrics), run["best_epoch"], run["seconds"]["total"])
        for name, run in runs.items()
    ]
    summary = summarize_runs(metrics, list(runs.values()))
    series = {"kind": kind, "output": str(output), **summary}
    series["runs"] = [dict(zip(columns, row, strict=True)) for row in rows]
    write_csv(output / "series.csv", rows, columns)
    write_json(output / "series.json", series)
    cells = [[name, *(f"{run[key]:.4f}" for key in metrics)] for name, run in runs.items()]
    display.table(("run", *metrics), cells, numbers=metrics)
    display.say(_sentence(kind, series), style="bold")
    return series


def summarize_runs(metrics: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean and sample standard deviation (n - 1) of each metric over the runs."""
    values = {name: [float(run[name]) for run in runs] for name in metrics}
    return {
        "num_runs": len(runs),
        "split": runs[0]["split"],
        "split_chose_checkpoint": any(run["split_chose_checkpoint"] for run in runs),
        "mean": {name: fmean(own) for name, own in values.items()},
        "std": {name: stdev(own) for name, own in values.items()},
    }


def _sentence(kind: str, series: Mapping[str, Any]) -> str:
    score = next(name for name in SCORES if name in series["mean"])
    number, spread = series["num_runs"], series["std"][score]
    # Folds share most of their training images, so a standard error of the mean would be too small.
    of_mean = f"; of the mean {spread / math.sqrt(number):.4f}" if kind == "repeats" else ""
    selection = " (images that also chose the epoch)" if series["split_chose_checkpoint"] else ""
    return (
        f"{METRIC_NAMES[score]} {series['mean'][score]:.4f} +/- {spread:.4f} (mean and standard deviation of "
        f"{number} {_KIND[kind]}s{of_mean}) on {series['split']}{selection}"
    )
