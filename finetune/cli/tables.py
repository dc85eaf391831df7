"""Tables on stdout."""

from __future__ import annotations

from collections.abc import Iterable

import typer


def print_table(columns: Iterable[str], rows: Iterable[list[str]]) -> None:
    """Plain columns on stdout, so that grep, sort and less work on them."""
    table = [list(columns), *rows]
    widths = [max(len(row[index]) for row in table) for index in range(len(table[0]))]
    for row in table:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
