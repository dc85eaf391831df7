"""Matrices of classes: the confusion matrix, and which classes occur together; up to what can be read.

Shape legend: K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from finetune.plots.svg import LETTER_WIDTH, Plot, element, shorten, text

MOST_CLASSES = 40
"""Largest number of classes: a larger matrix cannot be read."""
_LONGEST_LABEL = 20
"""Largest number of characters of a class name."""


def draw_confusion_matrix(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> Plot:
    """Draw counts: rows are true classes, columns are predicted ones; darker is a larger share of the row.

    Args:
        classes: K names, at most ``MOST_CLASSES``.
        counts: (K, K), number of images by true class and predicted class.
    """
    total, num_right = sum(map(sum, counts)), sum(row[index] for index, row in enumerate(counts))
    title = f"Confusion matrix of {len(classes)} classes: {num_right} of {total} images lie on the diagonal"
    said = "{count} of {total} images of {row} were predicted as {column}"
    return _draw("confusion_matrix", title, classes, counts, [*map(sum, counts)], ("true", "predicted"), said)


def draw_cooccurrence(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> Plot:
    """Draw how many images of each class have each other class too; darker is a larger share of the row.

    Args:
        classes: K names, at most ``MOST_CLASSES``.
        counts: (K, K), number of images with both classes; the diagonal has the images of each class.
    """
    title = f"Images that have two of {len(classes)} classes"
    said = "{count} of {total} images of {row} have {column}"
    totals = [row[index] for index, row in enumerate(counts)]
    return _draw("cooccurrence", title, classes, counts, totals, ("has", "also has"), said)


def _draw(
    name: str,
    title: str,
    classes: Sequence[str],
    counts: Sequence[Sequence[int]],
    totals: Sequence[int],
    axes: tuple[str, str],
    said: str,
) -> Plot:
    """Return the plot of a matrix; ``axes`` name rows and columns, and ``said`` is what a cell says."""
    side = _cell_side(len(classes), max(map(max, counts)))
    labels = [shorten(name, _LONGEST_LABEL) for name in classes]
    longest = max(LETTER_WIDTH * len(label) for label in labels)
    left = longest + 42
    is_flat = longest <= side - 4
    top = 40.0 if is_flat else 44 + longest * math.sin(math.radians(50))
    right = 10.0 if is_flat else 10 + longest * math.cos(math.radians(50))
    size = side * len(classes)
    parts = [
        text(left + size / 2, 14, axes[1], "faint middle"),
        text(12, top + size / 2, axes[0], "faint middle", transform=f"rotate(-90 12 {top + size / 2:.1f})"),
    ]
    for index, label in enumerate(labels):
        middle = index * side + side / 2
        parts.append(text(left - 8, top + middle + 4, label, "end"))
        parts.append(_column_label(left + middle, top - 8, label, is_flat))
        parts.extend(_row(index, classes, counts[index], totals[index], (left, top), side, said))
    return Plot(name, left + size + right, top + size + 8, title, Markup("").join(parts))


def _cell_side(num_classes: int, highest: int) -> float:
    """Return the side of a cell in pixels, in which the largest count fits."""
    fitting = 10 + 7.0 * len(str(highest))
    sides = ((3, 96), (6, 64), (12, 44), (1000, 24))
    return max(fitting, next(side for most, side in sides if num_classes <= most))


def _column_label(x: float, y: float, label: str, is_flat: bool) -> Markup:
    if is_flat:
        return text(x, y, label, "middle")
    return text(x + 3, y, label, transform=f"rotate(-50 {x + 3:.1f} {y:.1f})")


def _row(
    row: int,
    classes: Sequence[str],
    counts: Sequence[int],
    total: int,
    corner: tuple[float, float],
    side: float,
    said: str,
) -> list[Markup]:
    cells = []
    for column, count in enumerate(counts):
        x, y = corner[0] + column * side, corner[1] + row * side
        box = {"x": x + 1, "y": y + 1, "width": side - 2, "height": side - 2, "rx": min(4.0, side / 8)}
        parts = [element("rect", class_="cell", **box)]
        if count:
            share = count / total
            is_right = column == row
            shade = 0.12 + 0.83 * (share if is_right else math.sqrt(share))
            parts.append(element("rect", class_="right" if is_right else "wrong", fill_opacity=shade, **box))
            class_ = "middle" + " on" * (shade > 0.6) + " large" * (side >= 64)
            parts.append(text(x + side / 2, y + side / 2 + (5 if side >= 64 else 4), count, class_))
            tooltip = said.format(count=count, total=total, row=classes[row], column=classes[column])
            parts.append(element("title", f"{tooltip} ({100 * share:.1f} %)"))
        cells.append(element("g", *parts))
    return cells
