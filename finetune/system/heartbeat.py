"""Heartbeats, sent by the process that works to its supervisor.

Every progress bar sends a heartbeat with each unit of work. Heartbeats are lines of JSON, written to a pipe
whose file descriptor the parent names in an environment variable; without that variable nothing is sent.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from typing import Any

VARIABLE = "FINETUNE_PULSE"
INTERVAL = 0.2
"""Shortest time between two heartbeats, in seconds."""


class Heartbeat:
    """The sending side of the heartbeat.

    Args:
        descriptor: file descriptor of the pipe's writing end (:func:`find_parent`); None sends nothing.

    Attributes:
        step: the training step that was reached; the outcome records it.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self._descriptor = descriptor
        self.step = 0
        self._last = -INTERVAL
        if descriptor is not None:
            os.set_blocking(descriptor, False)  # a suspended parent must not block its child

    def beat(self) -> None:
        """Send a heartbeat, unless the last one was sent less than :data:`INTERVAL` seconds ago."""
        now = time.monotonic()
        if now - self._last >= INTERVAL:
            self._last = now
            self.send({"step": self.step})

    def send(self, facts: dict[str, Any]) -> None:
        """Send facts, such as ``{"step": 12}``, to the parent."""
        if self._descriptor is not None:
            with suppress(OSError):  # the pipe is full of unread heartbeats, or the parent has ended
                os.write(self._descriptor, json.dumps(facts).encode() + b"\n")


def find_parent() -> tuple[int, int] | None:
    """Return the descriptor of the pipe's writing end and the parent's process id; None without a supervisor.

    The variable holds a descriptor that was inherited, or a path if a launcher runs between the two.
    """
    end, _, process = os.environ.get(VARIABLE, "").partition(":")
    if not process.isdecimal():
        return None
    if end.isdecimal():
        return int(end), int(process)
    with suppress(OSError):
        return os.open(end, os.O_WRONLY | os.O_NONBLOCK), int(process)
    return None
