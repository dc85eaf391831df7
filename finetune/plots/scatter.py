"""Predicted numbers against true ones."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from finetune.plots.svg import Plot, Scale, element, find_ticks, line, text

SIDE = 340.0
MOST_POINTS = 2_000
"""Largest number of points; of more, evenly spaced ones are drawn."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 12.0, 26.0, 40.0


def draw_scatter(pairs: Sequence[tuple[float, float]], margin: float | None = None) -> Plot:
    """Draw a point for each image; exact predictions lie on the diagonal.

    Args:
        pairs: true and predicted number of each image, at least one.
        margin: half the width of the prediction interval, drawn as lines beside the diagonal; None for none.
    """
    step = -(-len(pairs) // MOST_POINTS)
    shown = pairs[::step]
    ticks = find_ticks(min(map(min, shown)), max(map(max, shown)), 5)
    low, high = ticks[0], ticks[-1]
    x, y = Scale(low, high, _LEFT, SIDE - _RIGHT), Scale(low, high, SIDE - _BOTTOM, _TOP)
    parts = [text(_LEFT, 14, "predicted", "strong"), *(_draw_tick(tick, x, y) for tick in ticks)]
    parts.append(text((x.start + x.end) / 2, SIDE - 6, "true value", "faint middle"))
    parts.append(line(x(low), y(low), x(high), y(high), "main"))
    if margin is not None and margin < high - low:
        for offset in (-margin, margin):
            first, last = max(low, low - offset), min(high, high - offset)
            parts.append(line(x(first), y(first + offset), x(last), y(last + offset), "other"))
    parts += [element("circle", cx=x(true), cy=y(said), r=2.5, class_="dot") for true, said in shown]
    title = f"Predicted against true numbers of {len(pairs)} images"
    return Plot("scatter", SIDE, SIDE, title, Markup("").join(parts))


def _draw_tick(tick: float, x: Scale, y: Scale) -> Markup:
    return (
        line(_LEFT, y(tick), SIDE - _RIGHT, y(tick), "grid")
        + text(_LEFT - 6, y(tick) + 4, f"{tick:.4g}", "faint end")
        + text(x(tick), SIDE - _BOTTOM + 15, f"{tick:.4g}", "faint middle")
    )
