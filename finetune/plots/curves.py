"""Values by epoch: loss, accuracy, learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup

from finetune.plots.svg import LETTER_WIDTH, Plot, Scale, element, find_ticks, line, text

WIDTH, HEIGHT = 360.0, 230.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 48.0, 12.0, 30.0, 36.0
MOST_DOTS = 40
"""Largest number of points for which a curve has a dot for each."""


def draw_curves(
    name: str,
    heading: str,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    format_value: Callable[[float], str],
    best: float | None = None,
) -> Plot:
    """Draw values by epoch: the first curve solid, the second dashed.

    Args:
        name: file name without its ending.
        heading: name of the value, in a word or two.
        curves: one or two lists of (epoch, value) by label, with at least one point in all.
        format_value: formats the ticks of the vertical axis.
        best: epoch whose weights were kept; a ring marks it on the first curve.
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
    labels = (text(x(tick), bottom + 15, int(tick), "faint middle") for tick in ticks or [x.low])
    return Markup("").join(labels) + text((x.start + x.end) / 2, HEIGHT - 6, "epoch", "faint middle")


def _legend(heading: str, labels: Sequence[str]) -> Markup:
    """Return the heading at the left, and the label of each curve at the right."""
    parts, left = [text(_LEFT, 16, heading, "strong")], WIDTH - _RIGHT
    left -= sum(44 + LETTER_WIDTH * len(label) for label in labels)
    for style, label in zip(("main", "other"), labels, strict=False):
        parts.append(line(left + 20, 12, left + 38, 12, style) + text(left + 44, 16, label))
        left += 44 + LETTER_WIDTH * len(label)
    return Markup("").join(parts)


def _curve(curve: Sequence[tuple[float, float]], x: Scale, y: Scale, style: str) -> Markup:
    pixels = [(x(epoch), y(value)) for epoch, value in curve]
    points = " ".join(f"{left:.1f},{top:.1f}" for left, top in pixels)
    drawn = element("polyline", points=points, class_=style)
    if len(pixels) > MOST_DOTS:
        return drawn
    dot_class = "dot" if style == "main" else "other-dot"
    dots = (element("circle", cx=left, cy=top, r=2.5, class_=dot_class) for left, top in pixels)
    return drawn + Markup("").join(dots)
