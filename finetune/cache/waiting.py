"""While another process writes a file that this one needs: say so once, and stay alive as long as it does."""

from __future__ import annotations

from pathlib import Path

from finetune.display import Display

_LOOKS = 5
"""At a file before the wait is mentioned: a second. One that is only looked at is free sooner."""


class Waiting:
    """To be called again and again while a file is written by another process.

    It is a sign of life only when the file has grown, so that a writer that hangs is noticed here too.

    Args:
        path: of the bytes.
        words: what the other process does, for people.
        display: where it is said.
    """

    def __init__(self, path: Path, words: str, display: Display) -> None:
        self._path, self._words, self._display = path, words, display
        self._looks, self._size = 0, -1

    def __call__(self) -> None:
        """Look once."""
        self._looks += 1
        if self._looks == _LOOKS:
            self._display.say(f"{self._words}; this one waits for it")
        try:
            size = self._path.stat().st_size
        except OSError:
            size = 0
        if size != self._size:
            self._size = size
            self._display.pulse.beat()
