"""A learning curve: accuracy by number of training images, measured and forecast, as SVG and as PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from finetune.plots.figure import COLOURS, FAINT, blank_figure, wrap, write_figure
from finetune.plots.svg import Plot, Scale, element, find_ticks, line, text

_WIDTH, _HEIGHT = 560.0, 320.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 16.0, 34.0, 40.0


@dataclass(frozen=True)
class CurvePoint:
    """An accuracy with its 90 % interval.

    Attributes:
        images: training images.
        accuracy: in [0, 1].
        low: lower end of the interval.
        high: upper end of the interval.
    """

    images: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class LearningCurvePlot:
    """What is drawn.

    Attributes:
        measured: measured points, the last with all images at hand.
        fitted: points of the fitted curve with its band, close together, in order.
        forecast: the images at hand and their multiples, which get ticks.
        target: accuracy that is drawn as a line, in (0, 1); None for none.
        title: network and features.
    """

    measured: Sequence[CurvePoint]
    fitted: Sequence[CurvePoint]
    forecast: Sequence[CurvePoint]
    target: float | None
    title: str

    @property
    def limits(self) -> tuple[float, float]:
        """The lowest and highest accuracy that is drawn."""
        points = (*self.measured, *self.fitted)
        targets = [] if self.target is None else [self.target]
        return min([*(one.low for one in points), *targets]), max([*(one.high for one in points), *targets])

    @property
    def ticks(self) -> list[int]:
        """Numbers of images with a tick: halves of the images at hand, and their forecast multiples."""
        number, first = self.forecast[0].images, self.fitted[0].images
        halves = [round(number / 2**power) for power in (3, 2, 1)]
        return [half for half in halves if half >= first] + [point.images for point in self.forecast]


# --- SVG -----------------------------------------------------------------------------------------


def draw_learning_curve(drawn: LearningCurvePlot) -> Plot:
    """Return the curve in the style of the report: dots were measured, the band is the 90 % interval."""
    low, high = drawn.limits
    ticks = [tick for tick in find_ticks(low, high, 5) if -1e-9 <= tick <= 1 + 1e-9]
    first, last = (math.log(drawn.fitted[place].images) for place in (0, -1))
    logarithms = Scale(first, last, _LEFT + 8, _WIDTH - _RIGHT - 14)
    y = Scale(min(ticks[0], low), max(ticks[-1], high), _HEIGHT - _BOTTOM, _TOP)

    def x(images: float) -> float:
        return logarithms(math.log(images))

    pixels = [(x(point.images), y(point.accuracy)) for point in drawn.fitted]
    ends = [(x(point.images), y(point.low)) for point in drawn.fitted]
    ends += [(x(point.images), y(point.high)) for point in reversed(drawn.fitted)]
    parts = [_axes(drawn, ticks, x(drawn.forecast[0].images), logarithms, y)]
    parts.append(element("polygon", points=_join(ends), class_="soft"))
    parts.append(element("polyline", points=_join(pixels), class_="main"))
    for point in drawn.measured:
        place = x(point.images)
        parts.append(line(place, y(point.low), place, y(point.high), "axis"))
        parts.append(element("circle", cx=place, cy=y(point.accuracy), r=3.5, class_="dot"))
    for point in drawn.forecast[1:]:
        parts.append(element("circle", cx=x(point.images), cy=y(point.accuracy), r=4.5, class_="ring"))
    if drawn.target is not None:
        label = f"target {100 * drawn.target:.4g} %"
        parts.append(line(_LEFT, y(drawn.target), _WIDTH - _RIGHT, y(drawn.target), "guide"))
        parts.append(text(_LEFT + 4, y(drawn.target) - 4, label, "faint"))
    return Plot("forecast", _WIDTH, _HEIGHT, _describe(drawn), Markup("").join(parts))


def _join(pixels: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{left:.1f},{top:.1f}" for left, top in pixels)


def _axes(
    drawn: LearningCurvePlot, ticks: Sequence[float], at_hand: float, logarithms: Scale, y: Scale
) -> Markup:
    bottom = _HEIGHT - _BOTTOM
    parts = [text(_LEFT, 16, "accuracy", "strong")]
    legend = "dots: measured; rings: forecast; band: 90 % interval"
    parts.append(text(_WIDTH - _RIGHT, 16, legend, "faint end"))
    for tick in ticks:
        parts.append(line(_LEFT, y(tick), _WIDTH - _RIGHT, y(tick), "grid"))
        parts.append(text(_LEFT - 6, y(tick) + 4, f"{100 * tick:.4g} %", "faint end"))
    for images in drawn.ticks:
        parts.append(text(logarithms(math.log(images)), bottom + 15, f"{images:,}", "faint middle"))
    parts.append(line(at_hand, _TOP, at_hand, bottom, "guide"))
    parts.append(text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, "training images", "faint middle"))
    return Markup("").join(parts)


def _describe(drawn: LearningCurvePlot) -> str:
    """Return what a screen reader reads."""
    said = ", ".join(
        f"{point.images} images {100 * point.accuracy:.1f} %, {100 * point.low:.1f} to {100 * point.high:.1f}"
        for point in drawn.forecast
    )
    return f"Learning curve and forecast, {drawn.title}: {said}"


# --- PNG -----------------------------------------------------------------------------------------


def write_learning_curve(path: Path, drawn: LearningCurvePlot) -> None:
    """Draw the same curve as PNG.

    Raises:
        DiskError: the disk is full, or the folder cannot be written.
    """
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator, PercentFormatter

    figure, axes = blank_figure(7.2, 4.4)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(drawn.ticks))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{images:,}" for images in drawn.ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    sizes = [point.images for point in drawn.fitted]
    axes.fill_between(
        sizes,
        [point.low for point in drawn.fitted],
        [point.high for point in drawn.fitted],
        color=COLOURS[0],
        alpha=0.2,
        linewidth=0,
        label="90 % interval",
    )
    axes.plot(
        sizes, [point.accuracy for point in drawn.fitted], color=COLOURS[0], linewidth=1.8, label="fitted"
    )
    values = [point.accuracy for point in drawn.measured]
    below = [point.accuracy - point.low for point in drawn.measured]
    above = [point.high - point.accuracy for point in drawn.measured]
    places = [point.images for point in drawn.measured]
    style = {"fmt": "o", "markersize": 5, "capsize": 2.5, "elinewidth": 1, "color": COLOURS[3]}
    axes.errorbar(places, values, [below, above], label="measured", **style)  # type: ignore[arg-type]
    later = drawn.forecast[1:]
    axes.plot(
        [point.images for point in later],
        [point.accuracy for point in later],
        "o",
        markersize=8,
        fillstyle="none",
        color=COLOURS[0],
        label="forecast",
    )
    axes.axvline(drawn.forecast[0].images, color=FAINT, linestyle=(0, (2, 3)), linewidth=1)
    if drawn.target is not None:
        axes.axhline(drawn.target, color=COLOURS[2], linestyle=(0, (5, 4)), linewidth=1.2, label="target")
    axes.set(xlabel="training images", ylabel="accuracy on new images")
    axes.set_title(wrap(drawn.title, 70), loc="left")
    axes.legend(loc="lower right", frameon=False)
    write_figure(path, figure)
