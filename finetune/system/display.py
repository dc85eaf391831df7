"""Words and progress for people: to stderr, and the words to the run's log as well.

On a terminal, work that takes time draws a bar; in a pipe or a log file there are plain lines only.
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
"""Takes how many units are done more, and a few words that stand beside the bar."""
Tell = Callable[[int, int], None]
"""Takes how many units are done, and how many there will be (0 where nobody knows)."""


class _Steady:
    """stderr, where words that cannot be written are lost: a full disk, a terminal or a reader that is gone.

    None of these is a reason to end a run.
    """

    def write(self, text: str) -> int:
        """Write what can be written."""
        with suppress(OSError, ValueError):
            return sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with suppress(OSError, ValueError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


class Display:
    """What the user sees while something runs. Words that cannot be written are lost, and nothing else is.

    Args:
        console: where it goes; stderr by default, since stdout belongs to results.
        pulse: told that the work goes on, with every unit of every bar.
    """

    def __init__(self, console: Console | None = None, heartbeat: Heartbeat | None = None) -> None:
        self.console = console or Console(file=cast(TextIO, _Steady()), highlight=False, emoji=False)
        self.heartbeat = heartbeat or Heartbeat()
        self._log: Path | None = None

    def log_to(self, path: Path) -> None:
        """Append everything said from now on to a file, with the time of day."""
        self._log = path

    def say(self, text: str, style: str = "") -> None:
        """Say one line."""
        text = sanitize(text)
        self.console.print(text, style=style or None, soft_wrap=True, markup=False)
        self.note(text)

    def warn(self, text: str) -> None:
        """Say one line that should not be missed."""
        self.say(f"warning: {text}", style="yellow")

    def note(self, text: str) -> None:
        """Write to the log only."""
        if self._log is None:
            return
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S")
        try:
            with self._log.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(f"{stamp} {line}\n" for line in sanitize(text).splitlines())
        except OSError as error:
            path, self._log = self._log, None
            self.warn(f"{path} cannot be written ({error.strerror}); nothing more goes into it")

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str] = ()
    ) -> None:
        """Show a table; columns named in ``numbers`` are aligned to the right."""
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
        """Turn a wheel while the block runs, where nobody can say how long it takes; a terminal only."""
        if not self.console.is_terminal:
            yield
            return
        with self.console.status(description):
            yield

    @contextmanager
    def track(self, description: str, total: int) -> Iterator[Advance]:
        """Draw a bar over ``total`` units while the block runs; a pipe sees nothing of it."""
        with self._bar() as progress:
            task = progress.add_task(description, total=total, words="")
            self.heartbeat.beat()

            def advance(done: int, words: str) -> None:
                self.heartbeat.beat()
                progress.update(task, advance=done, words=words)

            yield advance

    def count(self, description: str) -> AbstractContextManager[Tell]:
        """Draw a bar while the block runs, which learns on the way how far it is of how much."""
        return self._told(description, self._bar())

    def fetch(self, description: str) -> AbstractContextManager[Tell]:
        """Draw a bar over bytes while the block runs, with their rate; it is told as that of `count` is."""
        return self._told(description, self._bar(DownloadColumn(), TransferSpeedColumn()))

    @contextmanager
    def _told(self, description: str, bar: Progress) -> Iterator[Tell]:
        with bar as progress:
            task = progress.add_task(description, total=None, words="")

            def tell(done: int, total: int) -> None:
                self.heartbeat.beat()
                progress.update(task, completed=done, total=total or None)

            yield tell

    def _bar(self, *numbers: ProgressColumn) -> Progress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            *(numbers or [MofNCompleteColumn()]),
            TimeRemainingColumn(),
            TextColumn("{task.fields[words]}"),
        )
        return Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)


class SilentDisplay(Display):
    """A display that shows nothing, for use as a library."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True))
