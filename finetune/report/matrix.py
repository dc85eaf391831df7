"""The confusion matrix as a drawing, as long as its numbers can be read."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from finetune.report.svg import LETTER, Plot, element, shorten, text

MOST_CLASSES = 40
"""Beyond, nobody finds a cell."""
_LONGEST = 20
"""Letters of a class name."""


def draw_matrix(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> Plot:
    """Draw counts: a row a true class, a column a predicted one; darker is a larger share of the row.

    Args:
        classes: K names, at most ``MOST_CLASSES``.
        counts: (K, K).
    """
    side = _cell_side(len(classes), max(map(max, counts)))
    names = [shorten(name, _LONGEST) for name in classes]
    longest = max(LETTER * len(name) for name in names)
    left = longest + 42
    is_flat = longest <= side - 4
    top = 40.0 if is_flat else 44 + longest * math.sin(math.radians(50))
    right = 10.0 if is_flat else 10 + longest * math.cos(math.radians(50))
    size = side * len(classes)
    parts = [
        text(left + size / 2, 14, "predicted", "faint middle"),
        text(12, top + size / 2, "true", "faint middle", transform=f"rotate(-90 12 {top + size / 2:.1f})"),
    ]
    for number, name in enumerate(names):
        middle = number * side + side / 2
        parts.append(text(left - 8, top + middle + 4, name, "end"))
        parts.append(_column_name(left + middle, top - 8, name, is_flat))
        parts.extend(_row(number, classes, counts[number], (left, top), side))
    total, right_ones = sum(map(sum, counts)), sum(row[place] for place, row in enumerate(counts))
    title = f"Confusion matrix of {len(classes)} classes: {right_ones} of {total} images lie on the diagonal"
    return Plot("confusion_matrix", left + size + right, top + size + 8, title, Markup("").join(parts))


def _cell_side(num_classes: int, highest: int) -> float:
    room = 10 + 7.0 * len(str(highest))
    return max(
        room, next(side for most, side in ((3, 96), (6, 64), (12, 44), (1000, 24)) if num_classes <= most)
    )


def _column_name(x: float, y: float, name: str, is_flat: bool) -> Markup:
    if is_flat:
        return text(x, y, name, "middle")
    return text(x + 3, y, name, transform=f"rotate(-50 {x + 3:.1f} {y:.1f})")


def _row(
    number: int, classes: Sequence[str], counts: Sequence[int], corner: tuple[float, float], side: float
) -> list[Markup]:
    total, cells = sum(counts), []
    for place, count in enumerate(counts):
        x, y = corner[0] + place * side, corner[1] + number * side
        box = {"x": x + 1, "y": y + 1, "width": side - 2, "height": side - 2, "rx": min(4.0, side / 8)}
        parts = [element("rect", class_="cell", **box)]
        if count:
            share = count / total
            is_right = place == number
            shade = 0.12 + 0.83 * (share if is_right else math.sqrt(share))
            kind = "right" if is_right else "wrong"
            told = f"{count} of {total} images of {classes[number]} were called {classes[place]}"
            parts.append(element("rect", class_=kind, fill_opacity=shade, **box))
            look = "middle" + " on" * (shade > 0.6) + " large" * (side >= 64)
            parts.append(text(x + side / 2, y + side / 2 + (5 if side >= 64 else 4), count, look))
            parts.append(element("title", f"{told} ({100 * share:.1f} %)"))
        cells.append(element("g", *parts))
    return cells
