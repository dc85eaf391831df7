"""Ctrl-C and SIGTERM: at once where nothing is lost, after the step where training would be.

And no process outlives the one that it works for.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

ECHO = 0.5
"""Seconds in which a signal that comes again is the same one."""


def signals_to_stop() -> list[signal.Signals]:
    """Return the signals that ask a process to stop; SIGHUP is none of them under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if ignored else [signal.SIGHUP])]


class StopSignal:
    """Notes the signals that ask a process to stop.

    Inside :meth:`gently` the first signal only sets :attr:`asked`, so that the step can be finished and
    saved; the second, and any signal outside, raises KeyboardInterrupt at once. Batch systems send the same
    signal to every process of a job, and the parent passes its own on: two within half a second are one.
    Handlers belong to the main thread: elsewhere this does nothing.

    Args:
        gentle: the first signal only sets :attr:`asked`, outside :meth:`gently` as well. For the processes of
            a job that wait for its main one, which gets the same signal and says why all of them stop.
    """

    def __init__(self, gentle: bool = False) -> None:
        self.asked = False
        self._gentle = gentle
        self._last = -math.inf
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in signals_to_stop():
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():  # None: it was not Python's, and cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signal module's shape
        again = time.monotonic() - self._last < ECHO
        self._last = time.monotonic()
        if self._gentle and (again or not self.asked):
            self.asked = True
        elif not again:
            raise KeyboardInterrupt

    @contextmanager
    def gently(self) -> Iterator[None]:
        """Let the block end in its own time."""
        before, self._gentle = self._gentle, True
        try:
            yield
        finally:
            self._gentle = before


_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process as soon as its parent is gone, however that ended (Linux only).

    A decoding process that is left over would hold memory, and a training process the run's lock.

    Args:
        parent: the parent's process number; it may have ended already.
    """
    if not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
