"""A watch over the other processes of a job, for a main thread that waits for them inside a C call.

With NCCL a process waits for the others in ``loss.item()``, where neither a signal handler nor any other
Python code of the main thread runs; NCCL itself gives up after minutes. Two threads of each process end it
within seconds::

    neighbour   waits for a message of the process with the rank before; if it breaks off, publish the loss
    notices     read what any process has published, once a second. A failure: end this process

The main thread has :data:`GRACE` seconds to end the process in its own way, as it does wherever Python runs.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from finetune.errors import FinetuneError, LostProcessError
from finetune.system.distributed import Distributed
from finetune.system.failure import RESUME, publish_failure, read_failure

GRACE = 10.0
"""Seconds that the main thread has to end the process after another one has failed."""
_POLL_SECONDS = 1.0
_CONNECTING = timedelta(seconds=120)
_FOREVER = timedelta(days=365)
_FAREWELL = timedelta(seconds=2)
_LEFT = "finetune/left"
_LEAVE_SECONDS = 15.0
"""Seconds that the process with torch's store stays, so that the others can read why it ends."""


@contextmanager
def watched_processes(distributed: Distributed) -> Iterator[None]:
    """Watch the other processes of a job while the block runs.

    If one of them fails or is lost, and the block does not end within :data:`GRACE` seconds, this process is
    ended with the exit code of that failure, after the callbacks of
    :meth:`~finetune.system.distributed.Distributed.before_forced_end`.

    Every process makes this call.
    """
    if distributed.size == 1:
        yield
        return
    watch = _Watch(distributed)
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        watch.end(error)


class _Watch:
    """The two threads of one process.

    Args:
        distributed: all processes of the job.
    """

    def __init__(self, distributed: Distributed) -> None:
        self._distributed, self._rank, self._size = distributed, distributed.rank, distributed.size
        # Their own group and connection: the main thread may hold others while it waits.
        self._group: Any = dist.new_group(backend="gloo", timeout=_CONNECTING)
        self._store: Any = dist.distributed_c10d._get_default_store().clone()
        self._ended = threading.Event()
        for work in (self._watch_neighbour, self._watch_notices):
            threading.Thread(target=work, name=f"finetune{work.__name__}", daemon=True).start()

    def end(self, error: BaseException | None) -> None:
        """Stop watching, and tell the others that this process ends in an orderly way.

        Args:
            error: why it ends; None if its work is done.
        """
        self._ended.set()
        with suppress(RuntimeError):
            if isinstance(error, FinetuneError):
                publish_failure(self._store, self._rank, error)
            right = (self._rank + 1) % self._size
            farewell: Any = dist.isend(torch.ones(1), dst=right, group=self._group)
            farewell.wait(_FAREWELL)
        with suppress(RuntimeError):
            if self._rank:
                self._store.add(_LEFT, 1)
            elif not isinstance(error, LostProcessError):
                self._wait_for_others()

    def _wait_for_others(self) -> None:
        """Stay until the others have left: torch's store ends with this process, if it is in it."""
        deadline = time.monotonic() + _LEAVE_SECONDS
        held_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        while not held_by_launcher and time.monotonic() < deadline:
            if self._store.add(_LEFT, 0) >= self._size - 1:
                return
            time.sleep(0.05)

    # --- the threads -----------------------------------------------------------------------------

    def _watch_neighbour(self) -> None:
        left = (self._rank - 1) % self._size
        try:
            farewell: Any = dist.irecv(torch.zeros(1), src=left, group=self._group)
            farewell.wait(_FOREVER)
        except RuntimeError:
            if self._ended.is_set():
                return
            lost = LostProcessError("the run", "it has ended without saying why", RESUME)
            with suppress(RuntimeError):  # the store has ended too, which the other thread sees
                publish_failure(self._store, left, lost)

    def _watch_notices(self) -> None:
        while not self._ended.wait(_POLL_SECONDS):
            try:
                error = read_failure(self._store, self._rank)
            except RuntimeError as fault:
                found = (
                    f"the process that holds the connections has ended ({' '.join(str(fault).split())[:80]})"
                )
                error = LostProcessError(f"process {self._rank} of {self._size}", found, RESUME)
            if error is not None:
                self._end_process(error)
                return

    def _end_process(self, error: FinetuneError) -> None:
        if self._ended.wait(GRACE):
            return
        for callback in reversed(self._distributed.forced_end):
            with suppress(Exception):  # the exit code matters more
                callback(error)
        with suppress(RuntimeError):
            self._store.add(_LEFT, int(self._rank > 0))
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(int(error.exit_code))
