"""Figures and tables as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean, stdev

from benchmarks.results import Spread


def number(value: float) -> str:
    """Return three significant digits, and all digits before the point."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"


def span(value: Spread | None, unit: str = "") -> str:
    """Return ``median [min..max]``."""
    if value is None:
        return "-"
    if value.low == value.high:
        return f"{number(value.middle)}{unit}"
    return f"{number(value.middle)}{unit} [{number(value.low)}..{number(value.high)}]"


def percent(part: Spread | None, whole: Spread | None) -> str:
    """Return the share that one median has of another."""
    return f"{part.middle / whole.middle:.0%}" if part and whole else "-"


def points(shares: Sequence[float], sign: str = "") -> str:
    """Return the mean of shares in percent, and one standard deviation."""
    return f"{100 * mean(shares):{sign}.1f} ± {100 * (stdev(shares) if len(shares) > 1 else 0):.1f}"


def bold_best(cells: dict[str, str], values: dict[str, float]) -> dict[str, str]:
    """Return cells in which those of the highest value are bold."""
    best = max(values.values())
    return {name: f"**{cell}**" if values.get(name) == best else cell for name, cell in cells.items()}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table; without rows, that nothing was measured."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines] if lines else ["Not measured."]
