"""SVG drawings built as escaped text, with colours for light and dark pages.

The elements use the classes of ``plot.css`` and have no style of their own, so that a page can forbid inline
styles. A standalone file contains the style sheet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from importlib import resources

from markupsafe import Markup, escape

Number = float | int
_FLAT = 0.02
"""Smallest range of an axis, as a share of its value: smaller differences are not enlarged."""
LETTER_WIDTH = 6.4
"""Average width of a letter in pixels, at the font size of the plots (11 pixels)."""


@dataclass(frozen=True)
class Plot:
    """An SVG drawing.

    Attributes:
        name: file name without its ending.
        width: in pixels.
        height: in pixels.
        title: the description that a screen reader reads.
        body: SVG elements.
    """

    name: str
    width: float
    height: float
    title: str
    body: Markup

    @property
    def inline(self) -> Markup:
        """The ``svg`` element for a page that includes the style sheet."""
        return self._svg(self.body, {})

    @property
    def file(self) -> str:
        """The content of a standalone SVG file."""
        style = Markup("<style>{}</style>").format(Markup(load_style()))  # noqa: S704 - our own file
        paper = element("rect", class_="paper", width="100%", height="100%")
        size = {"xmlns": "http://www.w3.org/2000/svg", "height": round(self.height)}
        return str(self._svg(style + paper + self.body, size)) + "\n"

    def _svg(self, body: Markup, more: dict[str, object]) -> Markup:
        view_box = f"0 0 {_format_number(self.width)} {_format_number(self.height)}"
        common = {"role": "img", "aria-label": self.title, "viewBox": view_box, "width": round(self.width)}
        return element("svg", body, class_="plot", **common, **more)


@dataclass(frozen=True)
class Scale:
    """A linear map from values to pixels: ``low`` lies at ``start``, ``high`` at ``end``."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return self.start + share * (self.end - self.start)


@cache
def load_style() -> str:
    """Return the style sheet of all plots: colours for light and dark, fonts, lines."""
    return resources.files("finetune.plots").joinpath("plot.css").read_text(encoding="utf-8")


def element(name: str, *children: object, **attributes: object) -> Markup:
    """Return an element, escaped; ``class_`` is the attribute ``class``, and None omits an attribute."""
    pairs = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _format_number(value))
        for key, value in attributes.items()
        if value is not None
    )
    content = Markup("").join(escape(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), pairs, content)  # noqa: S704 - names are ours


def _format_number(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def text(x: Number, y: Number, content: object, class_: str | None = None, **more: object) -> Markup:
    """Return a ``text`` element whose baseline starts at (x, y)."""
    return element("text", content, x=x, y=y, class_=class_, **more)


def line(x1: Number, y1: Number, x2: Number, y2: Number, class_: str) -> Markup:
    """Return a straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def shorten(label: str, length: int) -> str:
    """Return a label of at most ``length`` characters: an ellipsis replaces the middle of a longer one.

    Characters that cannot be printed become U+FFFD.
    """
    label = "".join(char if char.isprintable() else "\ufffd" for char in label)
    if len(label) <= length:
        return label
    head = math.ceil((length - 1) / 2)
    return f"{label[:head]}\u2026{label[len(label) - (length - 1 - head) :]}"


def find_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers in steps of 1, 2 or 5 times a power of ten; the outer ones enclose the range."""
    if high - low < _FLAT * abs(high):  # centre a flat line
        low, high = low - _FLAT * abs(high) / 2, high + _FLAT * abs(high) / 2
    span = max(high - low, 1e-12)
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if span / (power * factor) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]
