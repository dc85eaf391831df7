"""Signs of life, from the process that works to the one that watches over it.

Everything that draws a bar gives a sign with every unit that is done. Lines of JSON go through a pipe whose
number the parent gives in an environment variable; without it, nothing is sent.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from typing import Any

VARIABLE = "FINETUNE_PULSE"
INTERVAL = 0.2


class Heartbeat:
    """The working side.

    Args:
        descriptor: of the pipe's writing end (:func:`find_parent`); None sends nothing.

    Attributes:
        step: of training that was reached, for the outcome.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self._descriptor = descriptor
        self.step = 0
        self._last = -INTERVAL
        if descriptor is not None:
            os.set_blocking(descriptor, False)  # a parent that was stopped must not stop its child

    def beat(self) -> None:
        """Give a sign of life, a few times a second at most."""
        now = time.monotonic()
        if now - self._last >= INTERVAL:
            self._last = now
            self.tell({"step": self.step})

    def tell(self, facts: dict[str, Any]) -> None:
        """Send facts to the parent."""
        if self._descriptor is not None:
            with suppress(OSError):  # a full pipe holds signs enough, and a dead parent needs none
                os.write(self._descriptor, json.dumps(facts).encode() + b"\n")


def find_parent() -> tuple[int, int] | None:
    """Return the pipe's writing end and the process that this one works for; None where nobody watches.

    The end is a number where it was handed down, and a path where a launcher stands in between.
    """
    end, _, process = os.environ.get(VARIABLE, "").partition(":")
    if not process.isdecimal():
        return None
    if end.isdecimal():
        return int(end), int(process)
    with suppress(OSError):
        return os.open(end, os.O_WRONLY | os.O_NONBLOCK), int(process)
    return None
