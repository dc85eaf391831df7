"""Stop on Ctrl-C and SIGTERM: after the current step while training, at once everywhere else.

:func:`end_with_parent` makes sure that no process outlives its parent.
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

from finetune.errors import FinetuneError

ECHO = 0.5
"""Seconds within which a repeated signal counts as the same one."""


def signals_to_stop() -> list[signal.Signals]:
    """Return the signals that ask a process to stop: SIGINT, SIGTERM and, except under nohup, SIGHUP."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if ignored else [signal.SIGHUP])]


class StopSignal:
    """Handles the signals that ask a process to stop.

    Inside :meth:`gently` the first signal only sets :attr:`asked`, so that the step can be finished and
    saved; a second signal, and any signal outside, raises KeyboardInterrupt at once. Batch systems send the
    same signal to every process of a job, and the supervisor forwards its own as well, so two signals within
    half a second count as one. Python handles signals in the main thread only: in other threads this class
    does nothing.

    Args:
        gentle: whether the first signal only sets :attr:`asked` outside :meth:`gently` as well. Used for
            ranks other than 0: rank 0 gets the same signal and tells them when to stop.

    Attributes:
        asked: whether a signal has asked the process to stop.
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
        for number, handler in self._before.items():  # None: not a Python handler, it cannot be restored
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
        """Let the block finish: the first signal only sets :attr:`asked`.

        After a FinetuneError it stays so: the process is ending, and a launcher signals all processes of a
        job that has lost one.
        """
        before, self._gentle = self._gentle, True
        try:
            yield
        except FinetuneError:
            before = True
            raise
        finally:
            self._gentle = before


_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Let the kernel end this process when its parent ends for any reason (Linux only).

    Otherwise a decoding process would keep its memory, and a training process the lock of the run folder.

    Args:
        parent: process id of the parent; it may have ended already.
        number: signal that ends this process.
    """
    if not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)
