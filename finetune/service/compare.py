"""Two finished jobs side by side: their metrics, and whether one is better on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.errors import FinetuneError, UsageError
from finetune.evaluation.compare_runs import compare_runs
from finetune.runs.reader import RunReader
from finetune.service.context import Context
from finetune.service.store.jobs import ConflictError
from finetune.service.store.states import State
from finetune.system.display import SilentDisplay

_TITLES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "map": "mean average precision",
    "f1_micro": "micro F1",
    "f1_macro": "macro F1",
    "r2": "R squared",
    "mae": "mean absolute error",
    "roc_auc": "ROC AUC",
    "loss": "log loss",
    "num_samples": "images",
}


def compare_jobs(context: Context, jobs: Sequence[str]) -> dict[str, Any]:
    """Return rows of metrics, and what ``finetune compare`` says of the two runs.

    Raises:
        UsageError: not two jobs were named.
        UnknownError: there is no such job.
        ConflictError: one of them has not succeeded.
    """
    if len(jobs) != 2:
        raise UsageError("compare", f"{len(jobs)} jobs were chosen", "Choose two that have succeeded.")
    found = [context.jobs.get(job) for job in jobs]
    for job in found:
        if job.state != State.SUCCEEDED:
            raise ConflictError(f"job {job.id}", f"it is {job.state}", "Choose one that has succeeded.")
    runs = [context.folder.job(job.id).run for job in found]
    rows: list[dict[str, Any]] = [
        {"job": job, "metrics": dict(RunReader(run, tolerant=True).metrics)}
        for job, run in zip(found, runs, strict=True)
    ]
    try:
        said = compare_runs([run.path for run in runs], None, SilentDisplay()).pairs[0].sentence
    except FinetuneError as error:
        said = f"They cannot be compared image by image: {error.found}."
    for job, run in zip(found, runs, strict=True):
        said = said.replace(str(run.path), job.label or job.id)
    titles = {name: title for name, title in _TITLES.items() if any(name in row["metrics"] for row in rows)}
    return {"rows": rows, "titles": titles, "said": f"{said[:1].upper()}{said[1:].rstrip('.')}."}
