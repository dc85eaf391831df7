"""Decoding processes: how they start and end, how many there should be, and what goes wrong with them."""

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
_NO_ROOM = {
    "Too many open files": _MORE_FILES,
    "ancdata": _MORE_FILES,  # the same, on the receiving side
    "No space left on device": _MORE_MEMORY,  # of /dev/shm
    "shared memory": _MORE_MEMORY,
    "Resource temporarily unavailable": "more processes help: ulimit -u, docker run --pids-limit",
    "Cannot allocate memory": "fewer decoding processes help: --workers",
}
"""What the system says where processes cannot be started, or cannot hand over batches, and what helps."""
_MOST_FILES = 65_536
"""Open files that are enough for any number of decoding processes: each tensor on its way is one."""
_PINNING = "_pin_memory_loop"
_DEATH = ("exited unexpectedly", "killed by signal")
"""What torch says of a process that ended, and of its own thread that met one."""


def start_worker(parent: int, _: int) -> None:
    """Stopping is the trainer's business: workers leave its process group, to which terminals and batch
    systems send their signals. They end when the loader says so, and the kernel ends them with their parent.
    """
    end_with_parent(parent)
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def choose_workers(workers: int, most: int, waited: float, seconds: float) -> int:
    """Return how many processes should decode from here on: more, where they were waited for.

    They made some batches in ``seconds``, and these can be used up in ``seconds - waited``. No single
    measurement is believed when it asks for more than twice as many.

    Args:
        workers: until now; none stays none.
        most: that there may be.
        waited: seconds that were spent waiting for data.
        seconds: of the whole measurement.
    """
    if not 0 < workers < most or waited <= MOST_WAITING * seconds:
        return workers
    needed = math.ceil(workers * min(2.0, seconds / max(seconds - waited, 1e-9)))
    return min(most, max(workers + 1, needed))


class WorkerDiedError(Exception):
    """A decoding process ended in the middle of its work."""


class NoRoomError(Exception):
    """Decoding processes cannot be started, or cannot hand over what they made.

    Args:
        found: what the system says.
        remedy: what helps.
    """

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(found)
        self.remedy = remedy


def start_pass(loader: DataLoader[Any]) -> Any:
    """Start a pass, without torch's handler for the end of a child.

    That one raises wherever this process happens to be, in the middle of an optimiser step as well. A death
    is seen without it, a few seconds later, where a batch is waited for.

    Raises:
        WorkerDiedError: a process ended at once.
        NoRoomError: processes cannot be started.
    """
    if loader.num_workers:
        _raise_limit_of_open_files()
        _remember_faults_of_pinning()
    with _named_faults(loader):
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
        WorkerDiedError: its process ended.
        NoRoomError: its process could not hand it over.
    """
    with _named_faults(loader, getattr(iterator, "_pin_memory_thread", None)):
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
def _named_faults(loader: DataLoader[Any], pinning: threading.Thread | None = None) -> Iterator[None]:
    """Tell faults of decoding processes from errors of what they carry out, which pass as they are."""
    try:
        yield
    except (OSError, EOFError, RuntimeError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        if loader.num_workers == 0:
            raise
        whole = f"{error} {getattr(pinning, 'fault', '')}"
        for word, remedy in _NO_ROOM.items():
            if word in whole:
                raise NoRoomError("Too many open files" if word == "ancdata" else word, remedy) from None
        forwarded = said[0].startswith("Caught ")
        # Between its end and the notice of it, a process leaves sockets that nobody answers.
        if not forwarded and (not isinstance(error, RuntimeError) or any(word in said[0] for word in _DEATH)):
            raise WorkerDiedError(said[-1]) from None
        raise
