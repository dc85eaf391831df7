"""The command of each kind of job, and how it says how it ended."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.errors import ExitCode
from finetune.recipe import load_recipe
from finetune.runs.files import write_text
from finetune.runs.folder import Outcome
from finetune.runs.reader import RunReader
from finetune.service.store.folder import JobFolder
from finetune.service.store.states import Kind


def prepare(kind: Kind, recipe: Mapping[str, Any], folder: JobFolder) -> Sequence[str]:
    """Write what a job's command reads, and return its words after ``finetune``.

    Raises:
        DiskError: the folder cannot be written.
    """
    folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if kind == Kind.CHECK:  # it begins anew with each attempt, in a folder that does not exist
        shutil.rmtree(folder.run.path, ignore_errors=True)
        return ["check", "--data", str(recipe["data"]["path"]), "--output", str(folder.run.path)]
    write_text(folder.recipe, load_recipe(None, recipe).to_yaml())
    return ["run", "--recipe", str(folder.recipe), "--output", str(folder.run.path)]


def read_outcome(kind: Kind, folder: JobFolder, code: int) -> Mapping[str, Any]:
    """Return how an attempt ended, from its files if they are this attempt's, else from its exit code."""
    reader = RunReader(folder.run, tolerant=True)
    if kind == Kind.CHECK and code in (ExitCode.DONE, ExitCode.DATA):
        return _summarise(reader.check, code)
    found = reader.outcome
    if found.get("exit_code") == code and found.get("state") != "running":
        return dict(found)
    message = f"its process was ended by signal {-code}" if code < 0 else f"it ended with exit code {code}"
    fault = "killed" if code < 0 else "failed"
    return Outcome("failed", message, "Read the log of the attempt.", code, fault, code < 0).to_dict()


def _summarise(check: Mapping[str, Any], code: int) -> Mapping[str, Any]:
    """Return the outcome of a check: done, or failed with the first issue that a run refuses."""
    errors = [one for one in check.get("findings", ()) if one.get("severity") == "error"]
    if code == ExitCode.DONE or not errors:
        return Outcome("done", f"{check.get('warnings', 0)} warnings", exit_code=code).to_dict()
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    message, hint = f"{errors[0].get('message', '')}{more}", str(errors[0].get("fix", ""))
    return Outcome("failed", message, hint, code, ExitCode.DATA.name.lower()).to_dict()
