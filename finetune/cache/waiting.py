"""While another process writes a file that this one needs: say so once, and stay alive as long as it does."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

from finetune.display import Display

_LOOKS = 5
"""At a file before the wait is mentioned: a second. One that is only looked at is free sooner."""


def wait_for_writer(path: Path, words: str, display: Display) -> Callable[[], None]:
    """Return a function to call again and again while another process writes a file.

    It is a sign of life only when the file has grown, so that a writer that hangs is noticed here too.

    Args:
        path: of the bytes.
        words: what the other process does, for people.
        display: where it is said.
    """
    looks, last = count(1), -1

    def look() -> None:
        nonlocal last
        if next(looks) == _LOOKS:
            display.say(f"{words}; this one waits for it")
        try:
            size = path.stat().st_size
        except OSError:
            size = 0
        if size != last:
            last = size
            display.pulse.beat()

    return look
