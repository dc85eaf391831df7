"""Figures as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.results import Spread


def number(value: float) -> str:
    """Return three significant digits, and all digits before the point."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def span(value: Spread | None) -> str:
    """Return ``median [min..max]``."""
    if value is None:
        return "-"
    if value.low == value.high:
        return number(value.middle)
    return f"{number(value.middle)} [{number(value.low)}..{number(value.high)}]"


def times(value: Spread | None) -> str:
    """Return a ratio, with its ends."""
    if value is None:
        return "-"
    if value.low == value.high:
        return f"{value.middle:.2f}x"
    return f"{value.middle:.2f}x [{value.low:.2f}..{value.high:.2f}]"


def percent(part: float | None, whole: float | None) -> str:
    """Return a share."""
    return "-" if part is None or not whole else f"{part / whole:.0%}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table, and an empty one."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]
