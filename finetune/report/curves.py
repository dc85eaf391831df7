"""Curves over epochs, and figures with their intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from finetune.report.svg import LETTER, Plot, element, find_ticks, line, text

WIDTH, HEIGHT = 360.0, 230.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 48.0, 12.0, 30.0, 36.0
MOST_DOTS = 40
"""Epochs that have a dot each."""


@dataclass(frozen=True)
class Scale:
    """From numbers to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the place of a number."""
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return self.start + share * (self.end - self.start)


def draw_curves(
    name: str,
    heading: str,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    format_value: Callable[[float], str],
    best: float | None = None,
) -> Plot:
    """Draw numbers by epoch: the first curve solid, the second dashed.

    Args:
        name: of the plot's file.
        heading: what is drawn, in a word or two.
        curves: one or two lists of (epoch, number), at least one point in all.
        format_value: of the axis.
        best: the epoch whose weights were kept, marked by a ring on the first curve.
    """
    points = [point for curve in curves.values() for point in curve]
    ticks = find_ticks(min(value for _, value in points), max(value for _, value in points), 4)
    epochs = [epoch for epoch, _ in points]
    x = Scale(min(epochs), max(*epochs, min(epochs) + 1), _LEFT + 6, WIDTH - _RIGHT - 6)
    y = Scale(ticks[0], ticks[-1], HEIGHT - _BOTTOM, _TOP)
    parts = [_value_axis(ticks, y, format_value), _epoch_axis(x, max(epochs)), _legend(heading, list(curves))]
    for style, curve in zip(("main", "other"), curves.values(), strict=False):
        parts.append(_curve(curve, x, y, style))
    first = dict(next(iter(curves.values())))
    if best is not None and best in first:
        parts.append(element("circle", cx=x(best), cy=y(first[best]), r=5, class_="ring"))
    title = f"{heading.capitalize()} by epoch"
    return Plot(name, WIDTH, HEIGHT, title, Markup("").join(parts))


def _value_axis(ticks: Sequence[float], y: Scale, format_value: Callable[[float], str]) -> Markup:
    rows = (
        line(_LEFT, y(tick), WIDTH - _RIGHT, y(tick), "grid")
        + text(_LEFT - 6, y(tick) + 4, format_value(tick), "faint end")
        for tick in ticks
    )
    return Markup("").join(rows)


def _epoch_axis(x: Scale, last: float) -> Markup:
    ticks = [tick for tick in find_ticks(x.low, last, 6) if x.low <= tick <= last and tick == int(tick)]
    bottom = HEIGHT - _BOTTOM
    marks = (text(x(tick), bottom + 15, int(tick), "faint middle") for tick in ticks or [x.low])
    return Markup("").join(marks) + text((x.start + x.end) / 2, HEIGHT - 6, "epoch", "faint middle")


def _legend(heading: str, names: Sequence[str]) -> Markup:
    """The heading on the left, and on the right what each curve is."""
    parts, left = [text(_LEFT, 16, heading, "strong")], WIDTH - _RIGHT
    left -= sum(44 + LETTER * len(name) for name in names)
    for style, name in zip(("main", "other"), names, strict=False):
        parts.append(line(left + 20, 12, left + 38, 12, style) + text(left + 44, 16, name))
        left += 44 + LETTER * len(name)
    return Markup("").join(parts)


def _curve(curve: Sequence[tuple[float, float]], x: Scale, y: Scale, style: str) -> Markup:
    places = [(x(epoch), y(value)) for epoch, value in curve]
    way = " ".join(f"{left:.1f},{top:.1f}" for left, top in places)
    drawn = element("polyline", points=way, class_=style)
    if len(places) > MOST_DOTS:
        return drawn
    kind = "dot" if style == "main" else "other-dot"
    dots = (element("circle", cx=left, cy=top, r=2.5, class_=kind) for left, top in places)
    return drawn + Markup("").join(dots)


def draw_intervals(rows: Sequence[tuple[str, float, tuple[float, float] | None]]) -> Plot:
    """Draw figures in [0, 1], each with its interval as a bar.

    Args:
        rows: name, value and interval of each; at least one.
    """
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
    title = f"Figures as dots{bars}: " + ", ".join(f"{name} {100 * value:.1f} %" for name, value, _ in rows)
    return Plot("intervals", width, bottom + 22, title, Markup("").join(parts))
