"""Messages and progress for the user, on stderr; messages also go to the run's log.

This is the only way to a terminal outside of the command line (:mod:`finetune.cli.output`), and all text on
it is sanitised (:func:`finetune.errors.sanitize`): a file name sends no commands to the terminal.

Progress bars are drawn on a terminal. A pipe and the log get a line after two seconds, and then from time to
time.
"""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from pathlib import Path
from threading import Event, Thread
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import Progress, Task, TaskID
from rich.table import Table
from rich.text import Text

from finetune.errors import sanitize, sanitize_line
from finetune.system.heartbeat import Heartbeat
from finetune.system.progress_line import GAP, ProgressLine, fit, format_time, list_facts
from finetune.system.regular_files import open_to_append

Advance = Callable[[int, str], None]
"""Takes the number of units done since the last call, and a short text shown next to the bar."""
OnProgress = Callable[[int, int], None]
"""Takes the number of units done so far, and the total (0 if it is unknown)."""


FIRST_LINE = 2.0
"""Seconds after which a line tells of work that has not ended."""
LONGEST_WAIT = 64.0
"""Longest time between two such lines, in seconds."""
LOOK = 1.0
"""Seconds between two looks at how far a block is, for those who follow the progress."""
Facts = dict[str, Any]
"""``phase`` (what is done now), and ``done``, ``total`` and ``seconds_left``, each null if unknown."""


class _SafeStderr:
    """stderr that ignores write errors: a full disk or a closed pipe must not end a run.

    ``sys.stderr`` is None if the stream was closed when Python started (``2>&-``).
    """

    def write(self, text: str) -> int:
        """Write text; an error is ignored."""
        with suppress(OSError, ValueError):
            if sys.stderr is not None:
                return sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush; an error is ignored."""
        with suppress(OSError, ValueError):
            if sys.stderr is not None:
                sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr if sys.stderr is not None else _no_stream(), name)


@cache
def _no_stream() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")


class Display:
    """Shows messages, tables and progress bars. A message that cannot be written is dropped.

    Args:
        console: where output goes; stderr by default, since stdout is for results.
        heartbeat: heartbeat that every unit of every bar sends; by default nothing is sent.
    """

    def __init__(self, console: Console | None = None, heartbeat: Heartbeat | None = None) -> None:
        self.console = console or Console(file=cast(TextIO, _SafeStderr()), highlight=False, emoji=False)
        self.heartbeat = heartbeat or Heartbeat()
        self._follow: Callable[[Facts], None] = lambda _: None
        self._log: Path | None = None
        self._waiting: deque[str] = deque(maxlen=1000)

    def log_to(self, path: Path) -> None:
        """Append every message, those from before included, to a file, with date and time."""
        self._log = path
        lines, self._waiting = [*self._waiting], deque(maxlen=0)
        self._append(lines)

    def follow(self, follow: Callable[[Facts], None]) -> None:
        """Call a function with what is known of the progress, about once a second, from several threads."""
        self._follow = follow

    def report(self, facts: Facts) -> None:
        """Tell those who follow the progress further facts."""
        self._follow(facts)

    def say(self, text: str, style: str = "") -> None:
        """Show one message, and write it to the log. A terminal breaks it between words only."""
        text = sanitize(text)
        self._print(text, style)
        self.note(text)

    def say_fields(self, fields: Sequence[str]) -> None:
        """Show one line of fields, the most important first; a terminal shows as many as fit.

        The log has all of them.
        """
        texts = [sanitize(field) for field in fields]
        self.note(GAP.join(texts))
        most = self.console.width if self.console.is_terminal else None
        self._print(fit(texts, most), "")

    def _print(self, text: str, style: str) -> None:
        if self.console.is_terminal:
            text = "\n".join(map(self._break, text.splitlines()))
        self.console.print(text, style=style or None, soft_wrap=True, markup=False)

    def _break(self, line: str) -> str:
        """Break a line between words; a word that is longer than a line, such as a path, stays whole."""
        width = max(self.console.width, 2)
        return "\n".join(textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False))

    def warn(self, text: str) -> None:
        """Show a warning, and write it to the log."""
        self.say(f"warning: {text}", style="yellow")

    def note(self, text: str) -> None:
        """Write a message to the log only. Each of its lines is sanitised alone: a traceback is long."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S")
        self._append([f"{stamp} {sanitize(line)}\n" for line in text.removesuffix("\n").split("\n")])

    def _append(self, lines: Sequence[str]) -> None:
        if self._log is None:
            self._waiting.extend(lines)
            return
        try:
            with open_to_append(self._log) as file:
                file.write("".join(lines).encode(errors="backslashreplace"))
        except OSError as error:
            path, self._log = self._log, None
            self.warn(f"{path} cannot be written ({error.strerror}); the log ends here")

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str] = ()
    ) -> None:
        """Show a table, and write it to the log; columns named in ``numbers`` are aligned to the right."""
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in columns:
            is_number = column in numbers
            header = Text(sanitize_line(column))  # Text: brackets are no markup
            table.add_column(
                header, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold"
            )
        for row in rows:
            table.add_row(*(Text(sanitize_line(cell)) for cell in row))
        self.console.print(table)
        for row in [columns, *rows]:
            self.note("  ".join(map(sanitize_line, row)))

    @contextmanager
    def busy(self, description: str) -> Iterator[None]:
        """Show a spinner while the block runs, for work of unknown length."""
        with self._tell(lambda: description, lambda: _facts(description)):
            if not self.console.is_terminal:
                yield
                return
            with self.console.status(Text(sanitize_line(description))):
                yield

    @contextmanager
    def track(self, description: str, total: int) -> Iterator[Advance]:
        """Show the progress over ``total`` units while the block runs; yield a function to advance it.

        The text beside the bar may have several parts, separated by commas, the most important first.
        """
        with self._bar(description, total) as (progress, task):
            self.heartbeat.beat()

            def advance(done: int, text: str) -> None:
                self.heartbeat.beat()
                progress.update(task, advance=done, text=text)

            yield advance

    def count(self, description: str) -> AbstractContextManager[OnProgress]:
        """Show the progress while the block runs; its total may become known later."""
        return self._count(description)

    def fetch(self, description: str) -> AbstractContextManager[OnProgress]:
        """Show the progress over bytes while the block runs, with the transfer rate; used like `count`."""
        return self._count(description, in_bytes=True)

    @contextmanager
    def _count(self, description: str, in_bytes: bool = False) -> Iterator[OnProgress]:
        with self._bar(description, None, in_bytes) as (progress, task):

            def on_progress(done: int, total: int) -> None:
                self.heartbeat.beat()
                progress.update(task, completed=done, total=total or None)

            yield on_progress

    @contextmanager
    def _bar(
        self, description: str, total: int | None, in_bytes: bool = False
    ) -> Iterator[tuple[Progress, TaskID]]:
        drawn = self.console.is_terminal
        column = ProgressLine(self.console)
        with Progress(column, console=self.console, transient=True, disable=not drawn) as progress:
            task = progress.add_task(description, total=total, text="", in_bytes=in_bytes)
            with self._tell(
                lambda: ", ".join([description, *list_facts(progress.tasks[0])]),
                lambda: _facts(description, progress.tasks[0]),
            ):
                yield progress, task

    @contextmanager
    def _tell(self, describe: Callable[[], str], count: Callable[[], Facts]) -> Iterator[None]:
        """Tell how far the block is, for as long as it runs: in the log, and where no bar can be drawn.

        The first line comes after two seconds, the others after ever longer times. A thread writes them,
        since a single step of the block may take minutes.
        """
        show = self.note if self.console.is_terminal else self.say
        ended, began = Event(), time.monotonic()

        def work() -> None:
            wait, next_line = FIRST_LINE, began + FIRST_LINE
            while not ended.wait(max(0.0, min(LOOK, next_line - time.monotonic()))):
                self._follow(count())
                if time.monotonic() >= next_line:
                    show(describe())
                    wait = min(2 * wait, LONGEST_WAIT)
                    next_line = time.monotonic() + wait

        self._follow(count())
        thread = Thread(target=work, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        if (seconds := time.monotonic() - began) > FIRST_LINE:
            show(f"{describe()}, done in {format_time(seconds)}")


def _facts(description: str, task: Task | None = None) -> Facts:
    """Return what is known of a block, as those who follow the progress get it."""
    if task is None:
        return {"phase": description, "done": None, "total": None, "seconds_left": None}
    total = None if task.total is None else int(task.total)
    left = task.time_remaining
    return {"phase": description, "done": int(task.completed), "total": total, "seconds_left": left}


class SilentDisplay(Display):
    """A display that shows nothing, for use of finetune as a library."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True))
