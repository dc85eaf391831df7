"""Everything that can end a run becomes an outcome: a reason, a remedy, an exit code, a file."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from finetune.display import Display
from finetune.errors import EnvironmentFaultError, FinetuneError, InternalError, InterruptedRunError
from finetune.runs.files import disk_error
from finetune.runs.folder import RunFolder, outcome_of


@contextmanager
def translated_errors(output: str = "") -> Iterator[None]:
    """Everything that can end a run becomes a FinetuneError with a reason and a remedy."""
    try:
        yield
    except KeyboardInterrupt:
        found = "it was stopped at once; what the last checkpoint holds is kept"
        fix = f"Give the same command again{f', with --output {output},' if output else ''} to go on."
        raise InterruptedRunError("the run", found, fix) from None
    except torch.OutOfMemoryError as error:
        found = " ".join(str(error).split())[:200]
        fix = "Halve --batch-size, or lower --img-size."
        raise EnvironmentFaultError("training on the GPU", found, fix) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        raise disk_error(Path(error.filename or "."), error) from None


@contextmanager
def recorded_outcome(folder: RunFolder, display: Display) -> Iterator[None]:
    """Write ``outcome.json`` for every end, and the traceback of an unforeseen one to the log."""
    folder.write_outcome("running", "the run is going on, or was killed")
    try:
        with translated_errors(str(folder.path)):
            yield
    except FinetuneError as error:
        _write_failure(folder, error)
        raise
    except Exception as error:
        display.note(traceback.format_exc())
        fix = f"This is our fault: please report it with {folder.log}."
        internal = InternalError("the run", _last_line(error), fix)
        _write_failure(folder, internal)
        raise internal from error
    folder.write_outcome("done", "finished")


def _last_line(error: Exception) -> str:
    """An error from a decoding process carries its whole traceback; its last line says what it was."""
    lines = str(error).strip().splitlines() or [""]
    return lines[-1] if len(lines) > 1 else f"{type(error).__name__}: {lines[0]}"


def _write_failure(folder: RunFolder, error: FinetuneError) -> None:
    with suppress(FinetuneError):  # the disk may be what failed
        folder.write_outcome(*outcome_of(error))
