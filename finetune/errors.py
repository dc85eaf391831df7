"""Errors that a user can cause, each in three parts and with an exit code that scripts can rely on.

Every error answers the same three questions: what was asked, what was found, what to do.
All text passes :func:`sanitize`, so that no secret, no control character and no megabytes of text reach a
terminal or a file.
This module imports nothing else of finetune, so every other module may raise these errors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from enum import IntEnum

_SHORTEST_SECRET = 8
"""Characters. Replacing shorter values, such as that of ``KEY=1``, would garble ordinary text and numbers."""
_SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|_KEY|_PAT|_PASS)$")
_ADDRESS = re.compile(r"\b([a-z][a-z0-9+.-]{0,15}://|https?:/)[^\s/?#]*@", re.IGNORECASE)
"""User and password of a URL; :class:`pathlib.Path` reduces its two slashes to one."""
_PASSWORD = re.compile(r"://[^\s/:@]*:([^\s/]+)@")
_SIGNATURE = re.compile(
    r"([?&](?:X-Amz-[\w-]+|[\w-]*(?:signature|token|policy|sig))=)[^&\s'\"]+", re.IGNORECASE
)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}|(?<=Bearer )[\w.~+/=-]{20,}", re.IGNORECASE)
_CONTROL = re.compile(
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff]+"
)
"""Characters that control a terminal, change the direction of text, or cannot be encoded as UTF-8."""
MOST_TEXT = 10_000
"""Largest number of characters of a text that is shown: a list of issues is shorter, a file is not shown."""
_GAP = " ... "
_EDGE = 1_000
"""Characters beside a cut that are left out as well, since a cut token would not be recognised."""
_LONGEST_WORD = 200
"""Characters of the longest word that is compared with known names."""


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
    """An error with its reason and its remedy.

    Args:
        asked: the user's request, as the user wrote it (``--data ./mydata``).
        found: the problem that was found (``the folder does not exist``).
        fix: the remedy, as an imperative sentence.
    """

    exit_code: ExitCode = ExitCode.INTERNAL

    def __init__(self, asked: str, found: str, fix: str) -> None:
        self.asked, self.found, self.fix = sanitize(asked), sanitize(found), sanitize(fix)
        super().__init__(self.asked, self.found, self.fix)

    @property
    def message(self) -> str:
        """What was asked and what was found, as one line or a short list."""
        return f"{self.asked}: {self.found}"

    def __str__(self) -> str:
        return f"{self.message}\n{self.fix}"


class UsageError(FinetuneError):
    """The command line or the recipe is invalid (exit 2)."""

    exit_code = ExitCode.USAGE


class TakenOverError(UsageError):
    """Another process has taken over the run folder: this one must not write to it any more (exit 2)."""


class DataError(FinetuneError):
    """The images, labels or splits do not allow a trustworthy result (exit 65)."""

    exit_code = ExitCode.DATA


class InternalError(FinetuneError):
    """A bug in finetune: a guarantee of its own did not hold (exit 70)."""

    exit_code = ExitCode.INTERNAL


class DiskError(FinetuneError):
    """Output could not be written (exit 74).

    Attributes:
        is_full: whether the disk or the quota is full; False for every other reason.
    """

    exit_code = ExitCode.DISK
    is_full = False


class InterruptedRunError(FinetuneError):
    """The user or the system stopped the run; the same command resumes it (exit 75).

    Attributes:
        output: the run folder to resume, as ``--output`` takes it; empty if there is none yet.
    """

    exit_code = ExitCode.INTERRUPTED
    output = ""


class LostProcessError(InterruptedRunError):
    """Another process of the job was killed or does not answer; restarting the job may help (exit 75)."""


class DivergedError(FinetuneError):
    """Losses or gradients became non-finite and stayed so at a lower learning rate (exit 76)."""

    exit_code = ExitCode.DIVERGED


class EnvironmentFaultError(FinetuneError):
    """The machine lacks what was asked for: a device, a network connection, a weights file (exit 78)."""

    exit_code = ExitCode.ENVIRONMENT


def sanitize(text: str) -> str:
    """Return text without secrets and with control characters escaped, so that it can be shown and stored.

    User and password of a URL, its signature, tokens, and the values of environment variables whose names
    sound like secrets (``..._TOKEN``, ``..._KEY``) become ``***``. The middle of a text of more than
    :data:`MOST_TEXT` characters is left out. Line breaks stay. The function is idempotent.
    """
    for secret in sorted(_secrets(), key=len, reverse=True):  # one secret may contain another
        text = text.replace(secret, "***")
    if len(text) > 4 * MOST_TEXT:  # the patterns take half a minute for ten megabytes
        head, tail = _escape(text[: 2 * MOST_TEXT]), _escape(text[-2 * MOST_TEXT :])
        text = f"{head[:-_EDGE]}{_GAP}{tail[_EDGE:]}"
    return shorten(_escape(text), MOST_TEXT)


def sanitize_line(text: str) -> str:
    """Return text as :func:`sanitize` does, on one line: for a cell of a table, or a progress bar."""
    return sanitize(text).replace("\n", "\\n")


def _escape(text: str) -> str:
    text = _TOKEN.sub("***", _SIGNATURE.sub(r"\1***", _ADDRESS.sub(r"\1***@", text)))
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shorten(text: str, most: int) -> str:
    """Return text of at most ``most`` characters (six or more); dots replace the middle of a longer one."""
    half = (most - len(_GAP)) // 2
    return text if len(text) <= most else f"{text[:half]}{_GAP}{text[-half:]}"


def _secrets() -> Iterator[str]:
    """Yield secret values of the environment: a library's message may quote one anywhere in its text."""
    for name, value in os.environ.items():
        secrets = [value] if _SECRET_NAME.search(name.upper()) else _PASSWORD.findall(value)
        yield from (secret for secret in secrets if len(secret) >= _SHORTEST_SECRET)


def count(number: int, one: str, many: str = "") -> str:
    """Return a number with its noun, such as ``1 image`` or ``2,000 images``; the plural ends in ``s``."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def find_nearest(word: str, known: Iterable[str]) -> list[str]:
    """Return up to three of ``known`` that are spelled like ``word``, the nearest first."""
    if len(word) > _LONGEST_WORD:
        return []
    return get_close_matches(word, list(dict.fromkeys(known)), n=3, cutoff=0.6)


def suggest(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'a' or 'b'?"`` for the nearest of ``known``, or ``""`` if none is near."""
    close = find_nearest(word, known)
    return f"; did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
