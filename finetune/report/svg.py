"""SVG as text in which nothing from outside is markup, in colours that follow light and dark.

A plot uses the classes of ``page/plot.css`` and no style of its own, so that the page can forbid inline
styles. As a file of its own it carries that style sheet with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from importlib import resources

from markupsafe import Markup, escape

Number = float | int
_FLAT = 0.02
"""Share of a number; an axis shows no smaller differences larger."""
LETTER = 6.4
"""Pixels of an average letter at the plots' 11 pixels."""


@dataclass(frozen=True)
class Plot:
    """A drawing.

    Attributes:
        name: of its file, without ending.
        width: in units that are about a pixel.
        height: in the same.
        title: what it shows, for those who hear the page.
        body: SVG elements.
    """

    name: str
    width: float
    height: float
    title: str
    body: Markup

    @property
    def inline(self) -> Markup:
        """For a page that has the style sheet."""
        return self._svg(self.body, {})

    @property
    def file(self) -> str:
        """A file that stands alone."""
        style = Markup("<style>{}</style>").format(Markup(load_part("plot.css")))  # noqa: S704 - our own file
        paper = element("rect", class_="paper", width="100%", height="100%")
        size = {"xmlns": "http://www.w3.org/2000/svg", "height": round(self.height)}
        return str(self._svg(style + paper + self.body, size)) + "\n"

    def _svg(self, body: Markup, more: dict[str, object]) -> Markup:
        view = f"0 0 {_text(self.width)} {_text(self.height)}"
        named = {"role": "img", "aria-label": self.title, "viewBox": view, "width": round(self.width)}
        return element("svg", body, class_="plot", **named, **more)


@cache
def load_part(name: str) -> str:
    """Return a part of the page that is the same for all runs: a style sheet, a script."""
    return resources.files("finetune.report").joinpath("page", name).read_text(encoding="utf-8")


def element(name: str, *children: object, **attributes: object) -> Markup:
    """Return an element; text and attributes are escaped, ``class_`` is ``class``, None leaves one out."""
    words = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _text(value))
        for key, value in attributes.items()
        if value is not None
    )
    inside = Markup("").join(escape(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), words, inside)  # noqa: S704 - names are ours


def _text(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def text(x: Number, y: Number, words: object, class_: str | None = None, **more: object) -> Markup:
    """Return words at a place."""
    return element("text", words, x=x, y=y, class_=class_, **more)


def line(x1: Number, y1: Number, x2: Number, y2: Number, class_: str) -> Markup:
    """Return a straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def shorten(words: str, letters: int) -> str:
    """Return words of at most so many letters, the middle left out."""
    words = "".join(char if char.isprintable() else "\ufffd" for char in words)
    if len(words) <= letters:
        return words
    head = math.ceil((letters - 1) / 2)
    return f"{words[:head]}\u2026{words[len(words) - (letters - 1 - head) :]}"


def find_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers, steps of 1, 2 or 5, of which the outer ones enclose the range."""
    if high - low < _FLAT * abs(high):  # a flat line lies in the middle
        low, high = low - _FLAT * abs(high) / 2, high + _FLAT * abs(high) / 2
    span = max(high - low, 1e-12)
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if span / (power * factor) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]
