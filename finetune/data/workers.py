"""Decoding processes: how they start and end, how many there should be, and what goes wrong with them."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader

from finetune.system.signals import end_with_parent

MOST_WAITING = 0.1
"""Share of the time that may be spent waiting for data before more processes decode."""
_NO_ROOM = (
    "No space left on device",  # of /dev/shm
    "shared memory",
    "Too many open files",
    "ancdata",  # the same, on the receiving side
    "Resource temporarily unavailable",  # too many processes
    "Cannot allocate memory",
)
"""What the system says where decoding processes cannot be started, or cannot hand over their batches."""
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
    """Decoding processes cannot be started, or cannot hand over what they made."""


def start_pass(loader: DataLoader[Any]) -> Any:
    """Start a pass, without torch's handler for the end of a child.

    That one raises wherever this process happens to be, in the middle of an optimiser step as well. A death
    is seen without it, a few seconds later, where a batch is waited for.

    Raises:
        WorkerDiedError: a process ended at once.
        NoRoomError: processes cannot be started.
    """
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
    with _named_faults(loader):
        return next(iterator, None)


@contextmanager
def _named_faults(loader: DataLoader[Any]) -> Iterator[None]:
    """Tell faults of decoding processes from errors of what they carry out, which pass as they are."""
    try:
        yield
    except (OSError, EOFError, RuntimeError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        if loader.num_workers == 0:
            raise
        for word in _NO_ROOM:
            if word in str(error):
                raise NoRoomError(word) from None
        forwarded = said[0].startswith("Caught ")
        # Between its end and the notice of it, a process leaves sockets that nobody answers.
        if not forwarded and (not isinstance(error, RuntimeError) or any(word in said[0] for word in _DEATH)):
            raise WorkerDiedError(said[-1]) from None
        raise
