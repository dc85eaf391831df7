"""Small pictures inside the page, as many as it can hold."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image, ImageOps

from finetune.data.decode import BadImageError, decode_image

MOST_BYTES = 3_000_000
"""Of all pictures of a page together, before base64 makes four bytes of three."""
_QUALITY = 78


@dataclass(frozen=True)
class Picture:
    """A picture of the page, or the reason why there is none.

    Attributes:
        source: a ``data:`` address; empty where there is none.
        gone: why there is none, in a few words.
    """

    source: str
    gone: str = ""


class Album:
    """Makes pictures for one page.

    Args:
        root: folder that paths are relative to; None where it is unknown or gone.
        most_bytes: of all pictures together; what comes later is left out.

    Attributes:
        left_out: how many found no room.
    """

    def __init__(self, root: Path | None, most_bytes: int = MOST_BYTES) -> None:
        self._root, self._room, self.left_out = root, most_bytes, 0

    def find(self, path: str) -> Path | None:
        """Return where a picture of the data lies; None where it cannot, or would lie outside."""
        pure = PurePosixPath(path)
        if self._root is None or pure.is_absolute() or ".." in pure.parts:
            return None
        return self._root / pure

    def show_file(self, path: str, side: int) -> Picture:
        """Return the middle square of a picture of the data, ``side`` pixels wide."""
        file = self.find(path)
        if file is None:
            return Picture("", "gone")
        try:
            picture = decode_image(file, side)
        except BadImageError as error:
            return Picture("", f"gone: {error.reason}")
        return self.show(ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS))

    def show(self, picture: Image.Image) -> Picture:
        """Return a picture as it is."""
        return self.show_bytes(encode(picture))

    def show_bytes(self, content: bytes) -> Picture:
        """Return a JPEG file as it is."""
        if len(content) > self._room:
            self.left_out += 1
            return Picture("", "left out: the page is full")
        self._room -= len(content)
        return Picture("data:image/jpeg;base64," + base64.b64encode(content).decode())


def encode(picture: Image.Image) -> bytes:
    """Return a JPEG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return buffer.getvalue()
