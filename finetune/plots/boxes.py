"""Draw boxes on an image."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

FOUND, TRUE = "#ff3b30", "#34c759"
"""Colours of a box that was found, and of one that was given."""


def draw_boxes(
    image: Image.Image, boxes: Sequence[tuple[float, float, float, float]], colour: str
) -> Image.Image:
    """Return a copy of an RGB image with boxes in one colour, on a dark line that shows on any ground.

    Args:
        image: is not changed.
        boxes: left, top, right, bottom as shares of width and height, in [0, 1].
        colour: of the lines.
    """
    drawn = image.copy()
    draw = ImageDraw.Draw(drawn)
    for left, top, right, bottom in boxes:
        corners = (
            left * (image.width - 1),
            top * (image.height - 1),
            right * (image.width - 1),
            bottom * (image.height - 1),
        )
        draw.rectangle(corners, outline="#000000", width=4)
        draw.rectangle(corners, outline=colour, width=2)
    return drawn
