"""The plan and the estimates of a job that is not submitted, made by the same command in a process."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from finetune.errors import EnvironmentFaultError
from finetune.launch.supervisor import own_command
from finetune.recipe import load_recipe
from finetune.runs.files import write_text
from finetune.service.problems import RefusedError
from finetune.service.settings import own_environment
from finetune.system.temporary import temporary_folder

MOST_SECONDS = 300.0


def run_dry(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``finetune run --dry-run --json`` says, but for the folder, which a job has from its id.

    Raises:
        RefusedError: the command refuses the recipe or its data.
        EnvironmentFaultError: it takes longer than five minutes.
    """
    with temporary_folder("finetune-dry-run-") as folder:
        file = Path(folder) / "recipe.yaml"
        write_text(file, load_recipe(None, recipe).to_yaml())
        command = [*own_command(), "run", "--dry-run", "--json", "--recipe", str(file)]
        try:
            done = subprocess.run(  # noqa: S603 - our own program, and a validated recipe
                command, capture_output=True, timeout=MOST_SECONDS, check=False, env=own_environment()
            )
        except subprocess.TimeoutExpired:
            found, fix = f"it takes more than {MOST_SECONDS:g} seconds", "Submit the job without it."
            raise EnvironmentFaultError("dry_run", found, fix) from None
    facts = _read(done.stdout)
    if done.returncode:
        found, fix = str(facts.get("message", "it failed")), str(facts.get("hint", "Correct the recipe."))
        raise RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, "dry_run", found, fix)
    return {name: fact for name, fact in facts.items() if name != "output"}


def _read(output: bytes) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(output)
    except ValueError:
        return {}
    return facts
