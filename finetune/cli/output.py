"""Output of the commands: errors and messages on stderr, results and tables on stdout.

An error becomes a message and the documented exit code, never a traceback.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import typer

from finetune.errors import ExitCode, FinetuneError, InterruptedRunError, sanitize
from finetune.launch.platforms import write_failure

DEBUG_VARIABLE = "FINETUNE_DEBUG"


@contextmanager
def handled_errors(as_json: bool = False) -> Iterator[None]:
    """Turn errors into messages and exit codes.

    Args:
        as_json: also write the error to stdout, as one JSON object.
    """
    try:
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
    except BrokenPipeError:  # the reader of stdout has ended, such as `head`
        _silence(sys.stdout)
        raise typer.Exit(ExitCode.DONE) from None
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        fix = f"This is a bug in finetune: please report it with the output of {DEBUG_VARIABLE}=1."
        _fail(sanitize(f"{type(error).__name__}: {error}"), fix, ExitCode.INTERNAL, as_json)


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
    if code == ExitCode.INTERRUPTED:  # everything is saved: ignore further Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    show_failure(message, fix, code, as_json)
    raise typer.Exit(int(code))


def show_failure(message: str, fix: str, code: ExitCode, as_json: bool) -> None:
    """Show what happened and what to do about it, on stderr, to a platform, and as JSON if asked for."""
    say(typer.style(f"error: {message}", fg="red"))
    say(fix)
    if code != ExitCode.INTERRUPTED:
        write_failure(message, fix)
    if as_json:
        state = "interrupted" if code == ExitCode.INTERRUPTED else "failed"
        write_stdout(
            json.dumps({"state": state, "message": message, "hint": fix, "exit_code": int(code)}) + "\n"
        )


def say(line: str) -> None:
    """Write a line to stderr; a closed stderr is ignored, so that the exit code stays right."""
    try:
        typer.echo(line, err=True)
    except OSError:
        _silence(sys.stderr)


def write_stdout(text: str | bytes) -> None:
    """Write to stdout; a closed stdout is ignored, so that the exit code stays right."""
    try:
        typer.echo(text, nl=False)
    except OSError:
        _silence(sys.stdout)


def _silence(stream: TextIO) -> None:
    """Redirect a closed stream to the null device, so that flushing it at exit raises no error."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_table(columns: Iterable[str], rows: Iterable[list[str]]) -> None:
    """Write a table to stdout in plain columns, so that grep, sort and less work on it."""
    table = [list(columns), *rows]
    widths = [max(len(row[index]) for row in table) for index in range(len(table[0]))]
    for row in table:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
