"""Turn everything that can end a run into an error with a reason and a remedy, and into ``outcome.json``."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finetune.errors import (
    EnvironmentFaultError,
    FinetuneError,
    InternalError,
    InterruptedRunError,
    LostProcessError,
    TakenOverError,
)
from finetune.runs.claim import RUNNING, Claim
from finetune.runs.files import concerns_output, disk_error
from finetune.runs.folder import Outcome, RunFolder
from finetune.system.compiler import compile_error, is_compile_error
from finetune.system.display import Display
from finetune.system.distributed import SINGLE_PROCESS, Distributed
from finetune.system.memory import is_out_of_memory, shortage_error
from finetune.system.temporary import find_temporary_fault


@contextmanager
def translated_errors(output: str = "", distributed: Distributed = SINGLE_PROCESS) -> Iterator[None]:
    """Turn known errors of the block, signals included, into a FinetuneError with a reason and a remedy.

    Args:
        output: path of the run folder, which the remedy names.
        distributed: processes of the job; the error is published to the others.
    """
    try:
        with _translated(output, distributed):
            yield
    except FinetuneError as error:
        distributed.publish(error)
        raise


@contextmanager
def report_unexpected(distributed: Distributed) -> Iterator[None]:
    """Report an unexpected error of another rank to rank 0, as an InternalError."""
    try:
        yield
    except FinetuneError:
        raise
    except Exception as error:
        where = " ".join(traceback.format_tb(error.__traceback__)[-1].split("\n")[0].split())
        fix = "This is a bug in finetune: please report it."
        internal = InternalError("the run", f"{_last_line(error)} ({where})", fix)
        distributed.publish(internal)
        raise internal from error


@contextmanager
def _translated(output: str, distributed: Distributed) -> Iterator[None]:
    try:
        with distributed.translated():
            yield
    except KeyboardInterrupt:
        if failure := distributed.read_failure():  # the launcher has stopped this process after a failure
            raise failure from None
        raise _stopped_at_once(output) from None
    except OSError as error:
        if fault := find_temporary_fault(error):
            raise fault from None
        if not concerns_output(error):
            raise
        raise disk_error(Path(error.filename or "."), error) from None
    except (RuntimeError, MemoryError) as error:
        known = _known_fault(error)
        if known is None:
            raise
        raise known from None


def _stopped_at_once(output: str) -> InterruptedRunError:
    """Return the error of a command that was stopped outside a training step; it says what is kept."""
    has_checkpoint = bool(output) and any(RunFolder(Path(output)).checkpoints.glob("*"))
    kept = "the last checkpoint and the cached features are" if has_checkpoint else "what was saved is"
    resume = f", with --output {output}, to resume" if output else "; it goes on with what is there"
    error = InterruptedRunError(
        "the run", f"it was stopped at once; {kept} kept", f"Give the same command again{resume}."
    )
    error.output = output
    return error


def _known_fault(error: BaseException) -> FinetuneError | None:
    """Return the error for a known message of torch; None for others."""
    if is_out_of_memory(error):
        return shortage_error("the run", error)
    if is_compile_error(error):  # of the backward pass, which is compiled when it runs
        return compile_error(error)
    message = " ".join(str(error).split())[:200]
    if "deterministic implementation" in message:
        fix = "Take another backbone, or --set deterministic=false."
        return EnvironmentFaultError("deterministic: true", message, fix)
    return None


@contextmanager
def recorded_outcome(
    claim: Claim, display: Display, distributed: Distributed = SINGLE_PROCESS
) -> Iterator[None]:
    """Write ``outcome.json`` however the block ends, and the traceback of an unexpected error to the log."""
    folder = claim.folder
    folder.write_outcome(Outcome("running", RUNNING, attempt=claim.attempt))

    def record(error: FinetuneError) -> None:
        display.heartbeat.send({"lost": isinstance(error, LostProcessError)})
        _write_failure(claim, error, display.heartbeat.step)

    try:
        with distributed.before_forced_end(record), _translated(str(folder.path), distributed):
            yield
            claim.check_owner()
    except TakenOverError:
        raise  # the folder belongs to another process, and so does its outcome
    except FinetuneError as error:
        record(error)  # before it is published to the others
        raise
    except Exception as error:
        display.note(traceback.format_exc())
        fix = f"This is a bug in finetune: please report it with {folder.log}."
        internal = InternalError("the run", _last_line(error), fix)
        _write_failure(claim, internal, display.heartbeat.step)
        raise internal from error
    folder.write_outcome(Outcome("done", "finished", step=display.heartbeat.step, attempt=claim.attempt))


def _last_line(error: Exception) -> str:
    """Return the last line of an error: one from a decoding process contains a whole traceback."""
    lines = str(error).strip().splitlines() or [""]
    return lines[-1] if len(lines) > 1 else f"{type(error).__name__}: {lines[0]}"


def _write_failure(claim: Claim, error: FinetuneError, step: int) -> None:
    with suppress(FinetuneError):  # the disk may be what failed
        claim.check_owner()
        claim.folder.write_outcome(Outcome.of(error, step, claim.attempt))
