"""What can go wrong for a user, said in three parts, and the exit code that a script can rely on.

Every refusal answers the same three questions: what was asked, what was found, what to do.
Whatever is said passes :func:`sanitize`, so that no secret and no control character gets out.
Nothing here imports anything of ours, so that every room may raise these.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from enum import IntEnum

_SHORTEST_SECRET = 8
"""Characters; to hide ``KEY=1`` would spoil every number."""
_SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|_KEY|_PAT|_PASS)$")
_ADDRESS = re.compile(r"\b([a-z][a-z0-9+.-]{0,15}://|https?:/)[^\s/?#]*@", re.IGNORECASE)
"""User and password of a URL; a path library leaves one slash of the two."""
_PASSWORD = re.compile(r"://[^\s/:@]*:([^\s/]+)@")
_SIGNATURE = re.compile(
    r"([?&](?:X-Amz-[\w-]+|[\w-]*(?:signature|token|policy|sig))=)[^&\s'\"]+", re.IGNORECASE
)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}|(?<=Bearer )[\w.~+/=-]{20,}", re.IGNORECASE)
_UNSEEN = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves a cursor, colours a terminal, turns its direction, or cannot be written at all."""


class ExitCode(IntEnum):
    """Exit codes of every command (the names follow sysexits.h where it has one)."""

    DONE = 0
    USAGE = 2
    DATA = 65
    INTERNAL = 70
    DISK = 74
    INTERRUPTED = 75
    DIVERGED = 76
    ENVIRONMENT = 78


class FinetuneError(Exception):
    """A refusal or failure with its reason and its remedy.

    Args:
        asked: what the user asked for, in the user's own words (``--data ./mydata``).
        found: what was found instead (``the folder does not exist``).
        fix: what to do about it, as an imperative sentence.
    """

    exit_code: ExitCode = ExitCode.INTERNAL

    def __init__(self, asked: str, found: str, fix: str) -> None:
        self.asked, self.found, self.fix = sanitize(asked), sanitize(found), sanitize(fix)
        super().__init__(self.asked, self.found, self.fix)

    @property
    def message(self) -> str:
        """What was asked and what was found, in one line or a short list."""
        return f"{self.asked}: {self.found}"

    def __str__(self) -> str:
        return f"{self.message}\n{self.fix}"


class UsageError(FinetuneError):
    """A command line or recipe that cannot be meant as it stands (exit 2)."""

    exit_code = ExitCode.USAGE


class TakenOverError(UsageError):
    """Another process works on the run by now: this one must not write a byte more (exit 2)."""


class DataError(FinetuneError):
    """Images, labels or splits that cannot give a trustworthy number (exit 65)."""

    exit_code = ExitCode.DATA


class InternalError(FinetuneError):
    """A promise of ours that did not hold (exit 70)."""

    exit_code = ExitCode.INTERNAL


class DiskError(FinetuneError):
    """Output that could not be written (exit 74).

    Attributes:
        is_full: for want of space, and nothing else.
    """

    exit_code = ExitCode.DISK
    is_full = False


class InterruptedRunError(FinetuneError):
    """Stopped by the user or the system; the same command goes on from here (exit 75)."""

    exit_code = ExitCode.INTERRUPTED


class LostProcessError(InterruptedRunError):
    """Another process of the job was killed, or does not answer; starting the job again may well succeed."""


class DivergedError(FinetuneError):
    """Losses or gradients that are no finite numbers, and stay so (exit 76)."""

    exit_code = ExitCode.DIVERGED


class EnvironmentFaultError(FinetuneError):
    """A machine that lacks what was asked for: a device, a network, a weights file (exit 78)."""

    exit_code = ExitCode.ENVIRONMENT


def sanitize(text: str) -> str:
    """Return text as it may be shown and kept: without secrets, and with control characters escaped.

    User and password of an address, its signature, tokens, and the values of environment variables that
    are called like secrets become ``***``. Doing it twice changes nothing.
    """
    for secret in sorted(_secrets(), key=len, reverse=True):  # one may hold another
        text = text.replace(secret, "***")
    text = _TOKEN.sub("***", _SIGNATURE.sub(r"\1***", _ADDRESS.sub(r"\1***@", text)))
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _secrets() -> Iterator[str]:
    """Libraries quote what they were given in words of their own, so the values are looked for as well."""
    for name, value in os.environ.items():
        words = [value] if _SECRET_NAME.search(name.upper()) else _PASSWORD.findall(value)
        yield from (word for word in words if len(word) >= _SHORTEST_SECRET)


def find_nearest(word: str, known: Iterable[str]) -> list[str]:
    """Return up to three of ``known`` that are spelt like ``word``, the nearest first."""
    return get_close_matches(word, list(dict.fromkeys(known)), n=3, cutoff=0.6)


def suggest(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'a' or 'b'?"`` for the nearest of ``known``, or ``""`` when none is near."""
    close = find_nearest(word, known)
    return f"; did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
