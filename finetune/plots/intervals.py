"""Values with their 95 % intervals: the metrics of a run, and the comparison of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from finetune.plots.svg import LETTER_WIDTH, Plot, Scale, element, find_ticks, line, shorten, text

Estimate = tuple[str, float, tuple[float, float] | None]
"""A name, its value, and the ends of the 95 % interval; None where there is no interval."""
_WIDTH, _ROW, _TOP, _FOOT = 720.0, 24.0, 36.0, 40.0
_LONGEST_LABEL = 38
"""Largest number of characters of a label."""
_ANNOTATION = 190.0
"""Pixels at the right for value and interval as text."""


@dataclass(frozen=True)
class Difference:
    """The accuracy of one run less that of another, in [-1, 1].

    Attributes:
        first: name of the run that is subtracted.
        second: name of the run that it is subtracted from.
        value: the difference.
        interval: its 95 % interval.
        is_claimed: whether the difference is significant; it is then drawn in colour.
    """

    first: str
    second: str
    value: float
    interval: tuple[float, float]
    is_claimed: bool


def draw_intervals(rows: Sequence[Estimate]) -> Plot:
    """Draw metrics in [0, 1] as dots, their intervals as bars; at least one."""
    left, step, width = 118.0, 30.0, 420.0
    lowest = min(min(value, pair[0] if pair else value) for _, value, pair in rows)
    ticks = [tick for tick in find_ticks(lowest, 1.0, 4) if tick <= 1 + 1e-9]
    bottom = 10 + step * len(rows)
    x = Scale(ticks[0], 1.0, left, width - 24)
    parts = [
        line(x(tick), 6, x(tick), bottom, "grid")
        + text(x(tick), bottom + 15, f"{100 * tick:.4g} %", "faint middle")
        for tick in ticks
    ]
    for number, (name, value, pair) in enumerate(rows):
        middle = 10 + step * (number + 0.5)
        parts.append(text(left - 10, middle + 4, name, "end"))
        if pair is not None:
            size = max(x(pair[1]) - x(pair[0]), 1.0)
            parts.append(
                element("rect", x=x(pair[0]), y=middle - 5, width=size, height=10, rx=5, class_="soft")
            )
        parts.append(element("circle", cx=x(value), cy=middle, r=4.5, class_="dot"))
    bars = ", their 95 % intervals as bars" if any(pair for _, _, pair in rows) else ""
    title = f"Metrics as dots{bars}: " + ", ".join(f"{name} {100 * value:.1f} %" for name, value, _ in rows)
    return Plot("intervals", width, bottom + 22, title, Markup("").join(parts))


def draw_comparison(
    scores: Sequence[Estimate], differences: Sequence[Difference], metric: str = "accuracy"
) -> Plot:
    """Draw the scores of runs, and below them the differences of pairs; at least one of each.

    Args:
        scores: scores of the runs, fractions.
        differences: differences of the compared pairs.
        metric: name of the score.
    """
    above, below = [_describe_run(run) for run in scores], [_describe_pair(pair) for pair in differences]
    longest = max(len(row.name) for row in (*above, *below))
    left = 16 + LETTER_WIDTH * min(longest, _LONGEST_LABEL) + 10
    middle = _TOP + _ROW * len(above) + _FOOT
    height = middle + _TOP + _ROW * len(below) + _FOOT
    body = _draw_panel(f"{metric} in percent, with 95 % interval", above, left, 0.0, None) + _draw_panel(
        "difference in points, with 95 % interval (grey: none can be claimed)", below, left, middle, 0.0
    )
    title = f"{metric[:1].upper()}{metric[1:]} of runs, and differences of pairs"
    return Plot("comparison", _WIDTH, height, title, body)


@dataclass(frozen=True)
class _IntervalRow:
    """A point with its interval, in percent or percentage points.

    Attributes:
        name: label at the left.
        value: value of the point.
        low: lower end of the interval.
        high: upper end of the interval.
        annotation: text at the right.
        is_strong: whether it is drawn in colour instead of grey.
    """

    name: str
    value: float
    low: float
    high: float
    annotation: str
    is_strong: bool


def _describe_run(run: Estimate) -> _IntervalRow:
    name, value, interval = run[0], 100 * run[1], run[2]
    if interval is None:
        return _IntervalRow(name, value, value, value, f"{value:.1f} %", True)
    low, high = (100 * end for end in interval)
    return _IntervalRow(name, value, low, high, f"{value:.1f} % ({low:.1f} to {high:.1f})", True)


def _describe_pair(pair: Difference) -> _IntervalRow:
    low, high = (100 * end for end in pair.interval)
    half = (_LONGEST_LABEL - 3) // 2
    name = f"{shorten(pair.second, half)} \u2212 {shorten(pair.first, half)}"
    annotation = f"{_signed(100 * pair.value)} ({_signed(low)} to {_signed(high)})"
    return _IntervalRow(name, 100 * pair.value, low, high, annotation, pair.is_claimed)


def _signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "\u2212")


def _draw_panel(
    heading: str, rows: Sequence[_IntervalRow], left: float, top: float, guide: float | None
) -> Markup:
    """Draw rows between a heading and their own axis."""
    ends = [end for row in rows for end in (row.low, row.high)] + ([] if guide is None else [guide])
    ticks = find_ticks(min(ends), max(ends))
    x = Scale(ticks[0], ticks[-1], left, _WIDTH - _ANNOTATION)
    bottom = top + _TOP + _ROW * len(rows)
    parts = [text(left, top + 22, heading, "strong")]
    for tick in ticks:
        parts.append(line(x(tick), top + _TOP, x(tick), bottom, "grid"))
        parts.append(text(x(tick), bottom + 16, f"{tick:g}".replace("-", "\u2212"), "faint middle"))
    if guide is not None:
        parts.append(line(x(guide), top + _TOP, x(guide), bottom, "axis"))
    for number, row in enumerate(rows):
        parts.append(_draw_row(row, x, left, top + _TOP + _ROW * (number + 0.5)))
    return Markup("").join(parts)


def _draw_row(row: _IntervalRow, x: Scale, left: float, y: float) -> Markup:
    line_class, dot_class = ("main", "dot") if row.is_strong else ("other", "other-dot")
    parts = [
        text(left - 10, y + 4, shorten(row.name, _LONGEST_LABEL), "end"),
        line(x(row.low), y, x(row.high), y, line_class),
        element("circle", cx=x(row.value), cy=y, r=4.5, class_=dot_class),
        text(_WIDTH - _ANNOTATION + 14, y + 4, row.annotation, "strong" if row.is_strong else "faint"),
    ]
    return Markup("").join(parts)
