"""Messages between the driver of a Ray run and its workers: an actor on the driver's machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """The kind of a message."""

    STARTED = "started"
    STDOUT = "stdout"
    STDERR = "stderr"
    PULSE = "pulse"
    EXIT = "exit"


@dataclass(frozen=True)
class Message:
    """From the process of one rank.

    Attributes:
        rank: of the process.
        kind: the kind of the message.
        content: bytes that the process wrote, or its exit code in decimal digits.
    """

    rank: int
    kind: Kind
    content: bytes = b""


@dataclass(frozen=True)
class LaunchSpec:
    """What every worker is to start.

    Attributes:
        arguments: of the command, as they stand after ``finetune``.
        folder: the driver's working folder, from which relative paths count.
        environment: variables of the driver that count everywhere.
        version: of finetune, which has to be the same everywhere.
    """

    arguments: Sequence[str]
    folder: str
    environment: Mapping[str, str]
    version: str


class Mailbox:
    """Keeps letters until the driver collects them, and tells the workers how often to stop."""

    def __init__(self) -> None:
        self._letters: list[Message] = []
        self._stops = 0

    def post(self, letters: Sequence[Message]) -> int:
        """Leave letters; return how many times the processes have been asked to stop."""
        self._letters.extend(letters)
        return self._stops

    def collect(self, stops: int) -> list[Message]:
        """Return the letters that came in, and keep how many times the processes are asked to stop."""
        self._stops = stops
        letters, self._letters = self._letters, []
        return letters
