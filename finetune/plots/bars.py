"""Bar plots: the reliability diagram of probabilities (arXiv:1706.04599), and the time of each phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from finetune.plots.svg import LETTER_WIDTH, Plot, Scale, element, line, text

_SIDE, _LEFT, _TOP, _STRIP = 250.0, 48.0, 28.0, 46.0


@dataclass(frozen=True)
class ReliabilityBin:
    """Predictions whose confidence lies between two limits. All but ``count`` are in [0, 1].

    Attributes:
        low: lower limit of the confidence.
        high: upper limit of the confidence.
        count: number of predictions.
        confidence: their mean confidence; None where it is not known.
        accuracy: share of them that is right; None where there are none.
    """

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


def draw_reliability(name: str, heading: str, bins: Sequence[ReliabilityBin]) -> Plot:
    """Draw the accuracy of the predictions by their confidence, and below it how many there are.

    Args:
        name: file name without its ending.
        heading: a few words above the plot.
        bins: in order of their confidence; empty ones are not drawn.
    """
    x, y = Scale(0, 1, _LEFT, _LEFT + _SIDE), Scale(0, 1, _TOP + _SIDE, _TOP)
    bottom = _TOP + _SIDE + 10 + _STRIP
    parts = [text(_LEFT, 16, heading, "strong")]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(line(x(0), y(tick), x(1), y(tick), "grid"))
        parts.append(text(_LEFT - 6, y(tick) + 4, f"{100 * tick:.0f} %", "faint end"))
        parts.append(text(x(tick), bottom + 15, f"{100 * tick:.0f} %", "faint middle"))
    most = max([*(single.count for single in bins), 1])
    for single in bins:
        parts.append(_draw_bin(single, x, y, bottom, most))
    parts.append(line(x(0), y(0), x(1), y(1), "guide"))
    parts.append(line(x(0), bottom, x(1), bottom, "axis"))
    parts.append(text(_LEFT + _SIDE / 2, bottom + 32, "confidence", "faint middle"))
    middle = _TOP + _SIDE / 2
    parts.append(text(10, middle, "accuracy", "faint middle", transform=f"rotate(-90 10 {middle:.1f})"))
    parts.append(text(_LEFT - 6, bottom - _STRIP / 2 + 4, "images", "faint end"))
    title = f"Reliability diagram, {heading}: accuracy by confidence; on the dotted line the two are equal"
    return Plot(name, _LEFT + _SIDE + 24, bottom + 40, title, Markup("").join(parts))


def _draw_bin(single: ReliabilityBin, x: Scale, y: Scale, bottom: float, most: int) -> Markup:
    low, high, count = single.low, single.high, single.count
    confidence, accuracy = single.confidence, single.accuracy
    if not count or accuracy is None:
        return Markup("")
    left, width = x(low) + 1, max(x(high) - x(low) - 2, 1.0)
    height = max(_STRIP * count / most, 1.5)
    tooltip = (
        f"{count} images of {100 * low:.0f} to {100 * high:.0f} % confidence, {100 * accuracy:.1f} % right"
    )
    parts = [
        element("title", tooltip),
        element("rect", x=left, y=y(accuracy), width=width, height=y(0) - y(accuracy), class_="soft"),
        line(left, y(accuracy), left + width, y(accuracy), "main"),
        element("rect", x=left, y=bottom - height, width=width, height=height, class_="other-dot"),
    ]
    if confidence is not None:
        parts.append(element("circle", cx=x(confidence), cy=y(accuracy), r=3.5, class_="ring"))
    return element("g", *parts)


def draw_seconds(seconds: Mapping[str, float]) -> Plot:
    """Draw the seconds of each phase in order; at least one phase."""
    left = 16 + LETTER_WIDTH * max(map(len, seconds))
    width, step = 420.0, 26.0
    x = Scale(0, max([*seconds.values(), 1e-9]), left, width - 80)
    parts = []
    for number, (phase, value) in enumerate(seconds.items()):
        top = 6 + step * number
        length = max(x(value) - left, 1.0)
        parts.append(text(left - 8, top + 14, phase, "end"))
        parts.append(element("rect", x=left, y=top + 3, width=length, height=15, rx=3, class_="bar"))
        parts.append(text(left + length + 8, top + 14, format_seconds(value), "faint"))
    title = "Time by phase: " + ", ".join(
        f"{phase} {format_seconds(value)}" for phase, value in seconds.items()
    )
    return Plot("seconds", width, 12 + step * len(seconds), title, Markup("").join(parts))


def format_seconds(seconds: float) -> str:
    """Return a duration as text: ``0.4 s``, ``21 s``, ``4 min 10 s``, ``2 h 5 min``."""
    if 0 < seconds < 0.05:
        return "under 0.1 s"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
