"""Pictures of the files of a data set, for pages and contact sheets."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from finetune.data.channels.arrays import draw_planes, read_array
from finetune.data.channels.depth import ValueRange
from finetune.data.channels.multiband import count_bands, read_tiff
from finetune.data.decode import BadImageError, decode_image
from finetune.data.formats import is_array_name


def load_picture(path: Path, side: int, value_range: ValueRange | None = None) -> Image.Image:
    """Return an image as ``decode_image`` does, or a picture of an array or of a TIFF of many bands.

    Raises:
        BadImageError: the file cannot be read.
    """
    if is_array_name(path.name):
        return draw_planes(read_array(path))
    try:
        return decode_image(path, side, value_range)
    except BadImageError:
        if count_bands(path) is None:
            raise
    return draw_planes(read_tiff(path))  # of bands that Pillow does not read


def load_thumbnail(path: Path, side: int, value_range: ValueRange | None = None) -> Image.Image | str:
    """Return an image (RGB) scaled so that its longer side has ``side`` pixels; small ones are enlarged.

    For a file that cannot be decoded, return the reason in a few words.
    """
    try:
        image = load_picture(path, side, value_range)
    except BadImageError as error:
        return error.reason
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)
