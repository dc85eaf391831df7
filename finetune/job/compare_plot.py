"""The drawing of a comparison: accuracies above, differences of pairs below, each with its 95 % interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from finetune.evaluation.paired_tests import PairedTest
from finetune.report.curves import Scale
from finetune.report.svg import LETTER, Plot, element, find_ticks, line, shorten, text

_WIDTH, _ROW, _TOP, _FOOT = 720.0, 24.0, 36.0, 40.0
_MOST_LETTERS = 38
_VALUES = 190.0
"""Pixels at the right, for what is said of a row."""


@dataclass(frozen=True)
class _Row:
    """A point with its interval, where there is one.

    Attributes:
        name: at the left.
        value: in percent or points.
        low: of its interval.
        high: of its interval.
        said: at the right.
        is_strong: drawn as what counts.
    """

    name: str
    value: float
    low: float
    high: float
    said: str
    is_strong: bool


def draw_comparison(runs: Sequence[Mapping[str, Any]], pairs: Sequence[PairedTest]) -> Plot:
    """Draw runs and pairs.

    Args:
        runs: rows of the table.
        pairs: with their tests.
    """
    points, differences = [_describe_run(run) for run in runs], [_describe_pair(pair) for pair in pairs]
    longest = max(len(row.name) for row in (*points, *differences))
    left = 16 + LETTER * min(longest, _MOST_LETTERS) + 10
    above = _draw_panel("accuracy in percent, with 95 % interval", points, left, 0.0, None)
    middle = _TOP + _ROW * len(points) + _FOOT
    below = _draw_panel(
        "difference in points, with 95 % interval (grey: none can be claimed)", differences, left, middle, 0.0
    )
    height = middle + _TOP + _ROW * len(differences) + _FOOT
    return Plot("comparison", _WIDTH, height, "Accuracies, and differences of pairs", above + below)


def _describe_run(run: Mapping[str, Any]) -> _Row:
    value = 100 * float(run["accuracy"])
    ends = (run["accuracy_low"], run["accuracy_high"])
    if None in ends:
        return _Row(str(run["run"]), value, value, value, f"{value:.1f} %", True)
    low, high = (100 * float(end) for end in ends)
    return _Row(str(run["run"]), value, low, high, f"{value:.1f} % ({low:.1f} to {high:.1f})", True)


def _describe_pair(pair: PairedTest) -> _Row:
    low, high = (100 * end for end in pair.interval)
    half = (_MOST_LETTERS - 3) // 2
    name = f"{shorten(pair.second, half)} \u2212 {shorten(pair.first, half)}"
    said = f"{_signed(100 * pair.difference)} ({_signed(low)} to {_signed(high)})"
    return _Row(name, 100 * pair.difference, low, high, said, pair.is_claimed)


def _signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "\u2212")


def _draw_panel(heading: str, rows: Sequence[_Row], left: float, top: float, guide: float | None) -> Markup:
    """Draw rows under a heading, over an axis of their own."""
    ends = [end for row in rows for end in (row.low, row.high)] + ([] if guide is None else [guide])
    ticks = find_ticks(min(ends), max(ends))
    x = Scale(ticks[0], ticks[-1], left, _WIDTH - _VALUES)
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


def _draw_row(row: _Row, x: Scale, left: float, y: float) -> Markup:
    look, dot = ("main", "dot") if row.is_strong else ("other", "other-dot")
    parts = [
        text(left - 10, y + 4, shorten(row.name, _MOST_LETTERS), "end"),
        line(x(row.low), y, x(row.high), y, look),
        element("circle", cx=x(row.value), cy=y, r=4.5, class_=dot),
        text(_WIDTH - _VALUES + 14, y + 4, row.said, "strong" if row.is_strong else "faint"),
    ]
    return Markup("").join(parts)
