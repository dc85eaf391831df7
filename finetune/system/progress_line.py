"""The line of a progress bar: what is known of a task, the most important first, as far as it fits.

::

    features of train images  352/692  0:41 left  ━━━━━━━━━━──────────
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from rich.cells import cell_len
from rich.console import Console
from rich.filesize import decimal
from rich.progress import ProgressColumn, Task
from rich.table import Column
from rich.text import Text

from finetune.errors import sanitize_line

GAP = "  "
"""Between two facts of a line."""
_LONGEST_BAR, _SHORTEST_BAR = 40, 8
_SHORTEST_NAME = 16
"""Columns that the description may take, however little room there is; otherwise it may take half a line."""


class ProgressLine(ProgressColumn):
    """Description, done and total, time left, further facts, and a bar in the room that is left.

    Args:
        console: the terminal.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._console = console

    def render(self, task: Task) -> Text:
        """Return the line; it is shorter than the terminal is wide."""
        width = self._console.width - 1
        facts = [sanitize_line(fact) for fact in list_facts(task)]
        name = Text(sanitize_line(task.description))
        name.truncate(max(width // 2, _SHORTEST_NAME), overflow="ellipsis")
        line = Text(fit([name.plain, *facts], width))
        room = width - cell_len(line.plain) - len(GAP)
        if task.total and room >= _SHORTEST_BAR:
            length = min(room, _LONGEST_BAR)
            done = round(length * min(task.completed / task.total, 1))
            full, empty = ("=", "-") if self._console.options.ascii_only else ("━", "─")
            line.append(GAP).append(full * done, style="bar.complete").append(empty * (length - done), "dim")
        return line


def list_facts(task: Task) -> list[str]:
    """Return done and total, the time left, and the task's text in its parts, as far as they are known."""
    show = decimal if task.fields["in_bytes"] else _count
    facts = []
    if task.total:
        facts.append(f"{show(int(task.completed))}/{show(int(task.total))}")
    elif task.completed:
        facts.append(show(int(task.completed)))
    if task.time_remaining and not task.finished:
        facts.append(f"{format_time(task.time_remaining)} left")
    if task.fields["in_bytes"] and task.speed:
        facts.append(f"{decimal(int(task.speed))}/s")
    return [*facts, *filter(None, task.fields["text"].split(", "))]


def _count(number: int) -> str:
    return f"{number:,}"


def fit(fields: Sequence[str], width: int | None) -> str:
    """Return the first fields that fit a width in one line, at least one; all of them without a width."""
    ends = accumulate(cell_len(field) + len(GAP) for field in fields)
    number = sum(width is None or end - len(GAP) <= width for end in ends)
    return GAP.join(fields[: max(number, 1)])


def format_time(seconds: float) -> str:
    """Return a time as ``0:41`` or ``2:05:00``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
