"""Messages between the driver of a Ray run and its workers, through an actor on the driver's machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum


class MessageKind(StrEnum):
    """The kind of a message."""

    STARTED = "started"
    STDOUT = "stdout"
    STDERR = "stderr"
    HEARTBEAT = "pulse"
    EXIT = "exit"


@dataclass(frozen=True)
class Message:
    """A message from the process of one rank.

    Attributes:
        rank: rank of the process, from 0.
        kind: kind of the message.
        content: bytes that the process wrote, or its exit code in decimal digits.
    """

    rank: int
    kind: MessageKind
    content: bytes = b""


@dataclass(frozen=True)
class LaunchSpec:
    """The command that every worker starts.

    Attributes:
        arguments: command-line arguments after ``finetune``.
        folder: the driver's working folder; relative paths start from it.
        environment: environment variables of the driver that every worker gets.
        version: version of finetune, which must be the same on every machine.
    """

    arguments: Sequence[str]
    folder: str
    environment: Mapping[str, str]
    version: str


class Mailbox:
    """Keeps messages until the driver collects them, and counts how often workers were asked to stop."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._stops = 0

    def post(self, messages: Sequence[Message]) -> int:
        """Add messages; return how many times the processes have been asked to stop."""
        self._messages.extend(messages)
        return self._stops

    def collect(self, stops: int) -> list[Message]:
        """Return and remove all messages; store how many times the processes have been asked to stop."""
        self._stops = stops
        messages, self._messages = self._messages, []
        return messages
