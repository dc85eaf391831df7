"""Messages and progress bars for the user, on stderr; messages also go to the run's log.

Progress bars are drawn on a terminal only; a pipe or a log file gets plain lines.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from finetune.errors import sanitize
from finetune.system.heartbeat import Heartbeat

Advance = Callable[[int, str], None]
"""Takes the number of units done since the last call, and a short text shown next to the bar."""
OnProgress = Callable[[int, int], None]
"""Takes the number of units done so far, and the total (0 if it is unknown)."""


class _SafeStderr:
    """stderr that ignores write errors: a full disk or a closed pipe must not end a run."""

    def write(self, text: str) -> int:
        """Write text; an error is ignored."""
        with suppress(OSError, ValueError):
            return sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush; an error is ignored."""
        with suppress(OSError, ValueError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


class Display:
    """Shows messages, tables and progress bars. A message that cannot be written is dropped.

    Args:
        console: where output goes; stderr by default, since stdout is for results.
        heartbeat: heartbeat that every unit of every bar sends; by default nothing is sent.
    """

    def __init__(self, console: Console | None = None, heartbeat: Heartbeat | None = None) -> None:
        self.console = console or Console(file=cast(TextIO, _SafeStderr()), highlight=False, emoji=False)
        self.heartbeat = heartbeat or Heartbeat()
        self._log: Path | None = None

    def log_to(self, path: Path) -> None:
        """Append every message from now on to a file, with date and time."""
        self._log = path

    def say(self, text: str, style: str = "") -> None:
        """Show one message, and write it to the log."""
        text = sanitize(text)
        self.console.print(text, style=style or None, soft_wrap=True, markup=False)
        self.note(text)

    def warn(self, text: str) -> None:
        """Show a warning, and write it to the log."""
        self.say(f"warning: {text}", style="yellow")

    def note(self, text: str) -> None:
        """Write a message to the log only."""
        if self._log is None:
            return
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S")
        try:
            with self._log.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(f"{stamp} {line}\n" for line in sanitize(text).splitlines())
        except OSError as error:
            path, self._log = self._log, None
            self.warn(f"{path} cannot be written ({error.strerror}); the log ends here")

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str] = ()
    ) -> None:
        """Show a table, and write it to the log; columns named in ``numbers`` are aligned to the right."""
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in columns:
            table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        self.console.print(table)
        for row in [columns, *rows]:
            self.note("  ".join(row))

    @contextmanager
    def busy(self, description: str) -> Iterator[None]:
        """Show a spinner while the block runs, for work of unknown length; on a terminal only."""
        if not self.console.is_terminal:
            yield
            return
        with self.console.status(description):
            yield

    @contextmanager
    def track(self, description: str, total: int) -> Iterator[Advance]:
        """Draw a progress bar over ``total`` units while the block runs; yield a function to advance it."""
        with self._bar() as progress:
            task = progress.add_task(description, total=total, text="")
            self.heartbeat.beat()

            def advance(done: int, text: str) -> None:
                self.heartbeat.beat()
                progress.update(task, advance=done, text=text)

            yield advance

    def count(self, description: str) -> AbstractContextManager[OnProgress]:
        """Draw a progress bar while the block runs; its total may become known later."""
        return self._count(description, self._bar())

    def fetch(self, description: str) -> AbstractContextManager[OnProgress]:
        """Draw a progress bar over bytes while the block runs, with the transfer rate; used like `count`."""
        return self._count(description, self._bar(DownloadColumn(), TransferSpeedColumn()))

    @contextmanager
    def _count(self, description: str, bar: Progress) -> Iterator[OnProgress]:
        with bar as progress:
            task = progress.add_task(description, total=None, text="")

            def on_progress(done: int, total: int) -> None:
                self.heartbeat.beat()
                progress.update(task, completed=done, total=total or None)

            yield on_progress

    def _bar(self, *numbers: ProgressColumn) -> Progress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            *(numbers or [MofNCompleteColumn()]),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        return Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)


class SilentDisplay(Display):
    """A display that shows nothing, for use of finetune as a library."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True))
