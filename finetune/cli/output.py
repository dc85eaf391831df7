"""Output of the commands: errors and messages on stderr, results and tables on stdout.

An error becomes a message and the documented exit code, never a traceback. Commands write to a terminal
through this module and :mod:`finetune.system.display` only (tests/test_architecture.py), which let no control
character of a file name pass.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import typer

from finetune.errors import (
    DiskError,
    ExitCode,
    FinetuneError,
    InterruptedRunError,
    UsageError,
    sanitize,
    sanitize_line,
    shorten,
)
from finetune.launch.platforms import write_failure
from finetune.launch.processes import is_in_job
from finetune.system.signals import StopSignal, signals_to_stop
from finetune.system.temporary import find_temporary_fault

DEBUG_VARIABLE = "FINETUNE_DEBUG"
_LONGEST_NAME = 200
"""Characters of a path that are shown if it is too long for the file system."""


@contextmanager
def handled_errors(as_json: bool = False) -> Iterator[None]:
    """Turn errors, and signals that ask a process to stop, into messages and exit codes.

    Args:
        as_json: also write the error to stdout, as one JSON object.
    """
    try:
        # Processes of a job are stopped by their launcher, which they tell why.
        with nullcontext() if is_in_job() else StopSignal():
            _check_working_folder()
            yield
    except typer.Exit:
        raise
    except InterruptedRunError as error:
        _fail(error.message, _with_command(error.fix, error.output), error.exit_code, as_json)
    except FinetuneError as error:
        _fail(error.message, error.fix, error.exit_code, as_json)
    except KeyboardInterrupt:
        fix = _with_command("Give the same command again.", "")
        _fail("interrupted", fix, ExitCode.INTERRUPTED, as_json)
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        _fail(*_describe(error), as_json)


def _describe(error: Exception) -> tuple[str, str, ExitCode]:
    """Return message, remedy and exit code for an error that no part of the program expected."""
    if isinstance(error, RecursionError):
        found = "folders, patterns or values are nested too deeply to follow"
        return found, "Name a folder further down, or less deeply nested input.", ExitCode.DATA
    if _is_not_utf8(error):
        found = "the name of a file or folder holds bytes that are not UTF-8"
        return found, "Rename it, and give the same command again.", ExitCode.USAGE
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        found = f"{shorten(str(error.filename), _LONGEST_NAME)!r} is longer than the file system allows"
        return f"a path: {found}", "Take a shorter name.", ExitCode.USAGE
    if fault := find_temporary_fault(error):
        return fault.message, fault.fix, fault.exit_code
    fix = f"This is a bug in finetune: please report it with the output of {DEBUG_VARIABLE}=1."
    return sanitize(f"{type(error).__name__}: {error}"), fix, ExitCode.INTERNAL


def _is_not_utf8(error: Exception) -> bool:
    """Return whether a text that stands for other bytes, as Python reads names of files, was written."""
    return isinstance(error, UnicodeEncodeError) and any("\udc80" <= one <= "\udcff" for one in error.object)


def _check_working_folder() -> None:
    try:
        Path.cwd()
    except FileNotFoundError:
        fix = "Change to a folder that exists, and give the same command again."
        raise UsageError("the working directory", "it does not exist any more", fix) from None


def _with_command(fix: str, output: str) -> str:
    """Add the whole command that resumes, on a line of its own, with ``--output`` if the user left it out."""
    program, words = Path(sys.argv[0]), sys.argv[1:]
    if not words or "finetune" not in (
        program.name,
        program.parent.name,
    ):  # called from Python, or by a platform
        return fix
    given = any(word.partition("=")[0] == "--output" or word.startswith("-o") for word in words)
    more = ["--output", output] if output and not given else []
    return f"{fix}\n  {sanitize(shlex.join(['finetune', *words, *more]))}"


def _fail(message: str, fix: str, code: ExitCode, as_json: bool) -> None:
    if code == ExitCode.INTERRUPTED:  # all is saved; a closed terminal sends two signals, the shell's too
        for number in signals_to_stop():
            signal.signal(number, signal.SIG_IGN)
    show_failure(message, fix, code, as_json)
    raise typer.Exit(int(code))


def show_failure(message: str, fix: str, code: ExitCode, as_json: bool) -> None:
    """Show what happened and what to do about it, on stderr, to a platform, and as JSON if asked for."""
    say(f"error: {message}", colour="red")
    say(fix)
    if code != ExitCode.INTERRUPTED:
        write_failure(message, fix)
    if as_json:
        state = "interrupted" if code == ExitCode.INTERRUPTED else "failed"
        with suppress(DiskError):  # the exit code is that of the first failure
            print_json({"state": state, "message": message, "hint": fix, "exit_code": int(code)})


# --- the only ways to stdout and stderr; the text of all but `relay` is sanitised -------------------


def say(text: str, colour: str | None = None, bold: bool = False) -> None:
    """Write a line to stderr; one that cannot be written is dropped, so that the exit code stays right."""
    with suppress(DiskError):
        _write(f"{_style(text, colour, bold)}\n", to_stderr=True)


def print_line(text: str = "", colour: str | None = None, bold: bool = False, end: str = "\n") -> None:
    """Write a line to stdout.

    Raises:
        DiskError: the disk is full.
    """
    _write(f"{_style(text, colour, bold)}{end}")


def print_text(text: str) -> None:
    """Write the lines of a file to stdout. Its tabs stay, since they may separate words.

    Raises:
        DiskError: the disk is full.
    """
    for line in text.splitlines():
        _write("\t".join(map(sanitize, line.split("\t"))) + "\n")


def print_table(columns: Iterable[str], rows: Iterable[list[str]]) -> None:
    """Write a table to stdout in plain columns, so that grep, sort and less work on it.

    Raises:
        DiskError: the disk is full.
    """
    safe = cache(sanitize_line)  # of thousands of cells most are equal
    table = [[safe(cell) for cell in row] for row in (list(columns), *rows)]
    widths = [max(len(row[index]) for row in table) for index in range(len(table[0]))]
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        _write("  ".join(cells).rstrip() + "\n")


def print_json(value: Any, indent: int | None = None) -> None:
    """Write a value to stdout as JSON, in which every control character is escaped.

    Raises:
        DiskError: the disk is full.
    """
    _write(json.dumps(value, indent=indent).replace("\x7f", "\\u007f") + "\n")


def relay(content: bytes) -> None:
    """Write to stdout what another process of this program wrote to its own.

    Raises:
        DiskError: the disk is full.
    """
    _write(content)


def _style(text: str, colour: str | None, bold: bool) -> str:
    safe = sanitize(text)
    return typer.style(safe, fg=colour, bold=bold or None) if colour or bold else safe


def _write(text: str | bytes, to_stderr: bool = False) -> None:
    """Write to a stream; one that is closed is ignored, so that the exit code stays right."""
    stream = sys.stderr if to_stderr else sys.stdout
    if isinstance(text, str):  # a stream of another encoding lacks most letters
        encoding = getattr(stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        typer.echo(text, nl=False, err=to_stderr)
    except OSError as error:
        _silence(stream)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            name = "standard error" if to_stderr else "standard output"
            fix = "Free some space, and give the same command again."
            raise DiskError(name, error.strerror or str(error), fix) from None


def replace_closed_streams() -> None:
    """Open the null device in place of standard streams that are closed (``2>&-``).

    The next file that is opened would get the number of the stream, and what libraries write there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)


def _silence(stream: TextIO) -> None:
    """Redirect a closed stream to the null device, so that flushing it at exit raises no error."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
