"""The contract between a job and the platform that starts it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from finetune.errors import DiskError, FinetuneError
from finetune.runs.files import write_text

LONGEST_FAILURE = 1024
"""Characters of a failure that SageMaker shows."""


@dataclass(frozen=True)
class Platform:
    """Where a platform wants things, and what it says in place of a command line.

    Attributes:
        name: for people.
        hyperparameters: settings, called like flags (``batch_size``) or keys of the recipe (``training.lr``).
        output: run folder that outlives the machine.
        model: folder that the finished model is copied to.
        results: folder that figures and report are copied to; None where the run folder is kept.
        boards: folder that TensorBoard's files are copied to.
        failure: file that says why a job failed.
        machines: of the job, each of which runs the same command.
        warning: about all this, in a sentence.
    """

    name: str
    output: Path
    hyperparameters: Mapping[str, str] = field(default_factory=dict)
    model: Path | None = None
    results: Path | None = None
    boards: Path | None = None
    failure: Path | None = None
    machines: Sequence[str] = ()
    warning: str = ""

    def find_data(self) -> Path | None:
        """Return where the platform has put the images; None where it leaves that to the user.

        Raises:
            UsageError: it cannot be told.
        """
        return None

    def settle(self) -> Platform:
        """Return the contract for a run whose folder the platform chooses, after a look at that place."""
        return self

    def check_writable(self) -> None:
        """Refuse before the training what would fail after it.

        Raises:
            DiskError: a folder that results are copied to cannot be written.
        """
        for folder in (self.model, self.results, self.boards):
            if folder is None:
                continue
            above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
            if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
                fix = "Let the image run as a user who may (docs/platforms.md says how)."
                found = f"user {os.getuid()} may not write there"
                raise DiskError(f"{folder}, where {self.name} looks for results", found, fix)

    def write_failure(self, message: str, fix: str = "") -> None:
        """Leave the reason of a failure where the platform looks for it; a long one loses its middle."""
        if self.failure is None or not is_main():
            return
        room = LONGEST_FAILURE - len(fix) - 2
        if len(message) > room > 5:
            message = f"{message[: room // 2 - 3]} ... {message[-(room // 2 - 3) :]}"
        with suppress(OSError, FinetuneError):  # the exit code says that it failed
            self.failure.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.failure, f"{message}\n{fix}\n"[:LONGEST_FAILURE])

    def clear_failure(self) -> None:
        """Take back a failure that was overcome."""
        if self.failure is not None and is_main():
            with suppress(OSError):
                self.failure.unlink(missing_ok=True)


def is_main() -> bool:
    """Return whether this process speaks for all that a launcher may have started."""
    return os.environ.get("RANK", "0") == "0"
