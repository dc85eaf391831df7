"""Where a pixel of the network's view lies in the image, and the other way round.

The evaluation view is the image, resized and then cropped in the middle, or padded.
Coordinates are in pixels from the top left corner; a pixel's own corners are whole numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from finetune.data.transforms import build_eval_steps
from pretrained.preprocessing import Preprocessing

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels; right and bottom are outside."""


@dataclass(frozen=True)
class ViewGeometry:
    """The evaluation view of one image.

    Attributes:
        image_size: width and height of the image.
        resized: width and height after resizing.
        view: width and height of the view.
    """

    image_size: tuple[int, int]
    resized: tuple[int, int]
    view: tuple[int, int]

    def to_image(self, box: Box) -> Box:
        """Return a box of the view in coordinates of the image, cut off at its edges."""
        left, top = self._corner()
        x, y = self.image_size[0] / self.resized[0], self.image_size[1] / self.resized[1]
        x0, y0, x1, y1 = (box[0] + left) * x, (box[1] + top) * y, (box[2] + left) * x, (box[3] + top) * y
        return _cut((x0, y0, x1, y1), self.image_size)

    def to_view(self, box: Box) -> Box:
        """Return a box of the image in coordinates of the view, cut off at its edges."""
        left, top = self._corner()
        x, y = self.resized[0] / self.image_size[0], self.resized[1] / self.image_size[1]
        x0, y0, x1, y1 = box[0] * x - left, box[1] * y - top, box[2] * x - left, box[3] * y - top
        return _cut((x0, y0, x1, y1), self.view)

    def _corner(self) -> tuple[int, int]:
        """Return the left and top edge of the crop in the resized image; negative where it is padded."""
        left, top = (_find_edge(self.resized[axis] - self.view[axis]) for axis in (0, 1))
        return left, top


def find_geometry(image_size: tuple[int, int], preprocessing: Preprocessing) -> ViewGeometry:
    """Return the geometry of the evaluation view.

    Args:
        image_size: width and height of the image, upright.
        preprocessing: preprocessing of the network.
    """
    resize, *_ = build_eval_steps(preprocessing)
    resized = resize(Image.new("L", image_size))
    height, width = preprocessing.size
    return ViewGeometry(image_size, resized.size, (width, height))


def _find_edge(excess: int) -> int:
    """Return the first pixel of a crop in the middle, as torchvision and timm round it."""
    return round(excess / 2) if excess >= 0 else -(-excess // 2)


def _cut(box: Box, size: tuple[int, int]) -> Box:
    x0, x1 = (min(max(value, 0.0), float(size[0])) for value in (box[0], box[2]))
    y0, y1 = (min(max(value, 0.0), float(size[1])) for value in (box[1], box[3]))
    return x0, y0, x1, y1
