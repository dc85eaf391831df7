"""Decoding processes: start and end, number, and errors."""

from __future__ import annotations

import math
import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch.utils.data import DataLoader

from finetune.system.signals import end_with_parent

MOST_WAITING = 0.1
"""Share of the time that may be spent waiting for data before more processes decode."""
_MORE_FILES = "more open files help: ulimit -n 65536, docker run --ulimit nofile=65536"
_MORE_MEMORY = "more shared memory helps: docker run --shm-size 8g"
_REMEDIES = {
    "Too many open files": _MORE_FILES,
    "ancdata": _MORE_FILES,  # the same, on the receiving side
    "No space left on device": _MORE_MEMORY,  # of /dev/shm
    "shared memory": _MORE_MEMORY,
    "Resource temporarily unavailable": "more processes help: ulimit -u, docker run --pids-limit",
    "Cannot allocate memory": "fewer decoding processes help: --workers",
}
"""Parts of system messages that mean: workers cannot start, or cannot pass on batches; and what helps."""
_MOST_FILES = 65_536
"""Open files that are enough for any number of workers: each tensor on its way is one."""
_PINNING = "_pin_memory_loop"
_DEATH_PHRASES = ("exited unexpectedly", "killed by signal")
"""Parts of torch's messages about a dead process, from the main thread and from its pinning thread."""


def start_worker(parent: int, _: int) -> None:
    """Set up signals in a decoding process (``worker_init_fn`` of the loader).

    Only the trainer handles a stop. So a worker leaves its process group, to which terminals and batch
    systems send their signals. A worker ends when the loader ends it, or with its parent.

    Args:
        parent: process id of the trainer.
    """
    end_with_parent(parent)
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def choose_workers(workers: int, most: int, waited: float, seconds: float) -> int:
    """Return how many processes should decode from here on: more if the caller waited for data.

    The workers needed ``seconds`` for some batches, and the caller alone needs ``seconds - waited``. One
    measurement at most doubles the number.

    Args:
        workers: number until now; 0 stays 0.
        most: largest number allowed.
        waited: seconds that the caller waited for data.
        seconds: duration of the whole measurement.
    """
    if not 0 < workers < most or waited <= MOST_WAITING * seconds:
        return workers
    needed = math.ceil(workers * min(2.0, seconds / max(seconds - waited, 1e-9)))
    return min(most, max(workers + 1, needed))


class WorkerDiedError(Exception):
    """A decoding process died during a pass."""


class WorkerResourceError(Exception):
    """The system lacks memory, files or processes to start workers or to pass on their batches.

    Args:
        found: part of the system's message.
        remedy: what helps.
    """

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(found)
        self.remedy = remedy


def start_pass(loader: DataLoader[Any]) -> Any:
    """Start a pass, without torch's handler of SIGCHLD.

    The handler would raise anywhere in this process, even in the middle of an optimizer step. Without it a
    dead worker is noticed a few seconds later, while waiting for a batch.

    Raises:
        WorkerDiedError: a process died at once.
        WorkerResourceError: processes cannot be started.
    """
    if loader.num_workers:
        _raise_limit_of_open_files()
        _remember_faults_of_pinning()
    with _classified_errors(loader):
        if threading.current_thread() is not threading.main_thread():
            return iter(loader)
        before = signal.getsignal(signal.SIGCHLD)
        try:
            return iter(loader)
        finally:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


def fetch(loader: DataLoader[Any], iterator: Any) -> Any:
    """Return the next batch of a pass, or None at its end.

    Raises:
        WorkerDiedError: a process died.
        WorkerResourceError: a process could not pass on its batch.
    """
    with _classified_errors(loader, getattr(iterator, "_pin_memory_thread", None)):
        return next(iterator, None)


def _raise_limit_of_open_files() -> None:
    """Raise this process's own limit as far as it may be raised; the usual one is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _remember_faults_of_pinning() -> None:
    """Keep the error that ends torch's pinning thread with the thread, instead of printing its traceback.

    That thread receives the batches where a GPU trains. torch only says that it ended.
    """
    before = threading.excepthook
    if getattr(before, "remembers", False):
        return

    def remember(ended: threading.ExceptHookArgs) -> None:
        if ended.thread is not None and _PINNING in ended.thread.name:
            ended.thread.fault = ended.exc_value  # type: ignore[attr-defined]
        else:
            before(ended)

    remember.remembers = True  # type: ignore[attr-defined]
    threading.excepthook = remember


@contextmanager
def _classified_errors(loader: DataLoader[Any], pinning: threading.Thread | None = None) -> Iterator[None]:
    """Convert errors of the processes themselves; errors of the code that they run pass unchanged."""
    try:
        yield
    except (OSError, EOFError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if loader.num_workers == 0:
            raise
        whole = f"{error} {getattr(pinning, 'fault', '')}"
        for phrase, remedy in _REMEDIES.items():
            if phrase in whole:
                found = "Too many open files" if phrase == "ancdata" else phrase
                raise WorkerResourceError(found, remedy) from None
        forwarded = lines[0].startswith("Caught ")
        # Before a death is noticed, its sockets already raise other errors.
        if not forwarded and (
            not isinstance(error, RuntimeError) or any(phrase in lines[0] for phrase in _DEATH_PHRASES)
        ):
            raise WorkerDiedError(lines[-1]) from None
        raise
