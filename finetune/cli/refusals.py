"""One error path for every command: a sentence on stderr, the documented exit code, no traceback."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from finetune.errors import ExitCode, FinetuneError, sanitize

DEBUG_VARIABLE = "FINETUNE_DEBUG"


@contextmanager
def refusals(as_json: bool = False) -> Iterator[None]:
    """Turn errors into messages and exit codes.

    Args:
        as_json: stdout must carry one JSON object even now.
    """
    try:
        yield
    except typer.Exit:
        raise
    except FinetuneError as error:
        _fail(error.message, error.fix, error.exit_code, as_json)
    except KeyboardInterrupt:
        _fail("interrupted", "Give the same command again.", ExitCode.INTERRUPTED, as_json)
    except BrokenPipeError:  # the reader of stdout has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(ExitCode.DONE) from None
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        fix = f"This is our fault: please report it with what {DEBUG_VARIABLE}=1 prints."
        _fail(sanitize(f"{type(error).__name__}: {error}"), fix, ExitCode.INTERNAL, as_json)


def _fail(message: str, fix: str, code: ExitCode, as_json: bool) -> None:
    if code == ExitCode.INTERRUPTED:  # everything is saved and said: more of the same adds nothing
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    typer.secho(f"error: {message}", err=True, fg="red")
    typer.echo(fix, err=True)
    if as_json:
        state = "interrupted" if code == ExitCode.INTERRUPTED else "failed"
        typer.echo(json.dumps({"state": state, "message": message, "hint": fix, "exit_code": int(code)}))
    raise typer.Exit(int(code))
