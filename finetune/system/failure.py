"""The notice by which a process of a job tells the others why it fails: one key in torch's store.

The first failure counts, since the others usually follow from it.
"""

from __future__ import annotations

import json
from typing import Any

from finetune.errors import ExitCode, FinetuneError, LostProcessError

_KEY = "finetune/failure"
RESUME = "Give the same command again, with the same --output, to resume."


def publish_failure(store: Any, rank: int, error: FinetuneError) -> None:
    """Store why a process fails, unless a failure is stored already.

    Args:
        store: torch's store of the job.
        rank: rank of the process within the job.
        error: its error.

    Raises:
        RuntimeError: the process that holds the store has ended.
    """
    failure = {
        "rank": rank,
        "asked": error.asked,
        "found": error.found,
        "fix": error.fix,
        "code": int(error.exit_code),
        "lost": isinstance(error, LostProcessError),
    }
    store.compare_set(_KEY, "", json.dumps(failure))


def read_failure(store: Any, rank: int) -> FinetuneError | None:
    """Return the error of another process; None if there is none.

    Args:
        store: torch's store of the job.
        rank: rank of this process within the job.

    Raises:
        RuntimeError: the process that holds the store has ended.
    """
    if not store.check([_KEY]):
        return None
    failure = json.loads(store.get(_KEY))
    if failure["rank"] == rank:
        return None
    kind = LostProcessError if failure["lost"] else FinetuneError
    error = kind(f"process {failure['rank']}, {failure['asked']}", failure["found"], failure["fix"])
    error.exit_code = ExitCode(failure["code"])
    return error
