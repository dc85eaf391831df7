"""The header of a TIFF: number, kind and order of its bands, which decide whether Pillow reads it rightly.

Pillow drops bands beyond the third in silence, reads planar bands of 16 bits as if they had 8, and calls
other layouts unknown. All are refused here with what the file holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, BinaryIO

from PIL.TiffImagePlugin import ImageFileDirectory_v2

from finetune.data.limits import MAX_PARTS
from pretrained.preprocessing import MOST_CHANNELS

_COLOUR_BANDS = {0: 1, 1: 1, 2: 3, 3: 1, 4: 1, 5: 4, 6: 3, 8: 3}
"""Bands by photometric interpretation: greys, RGB, palette, mask, CMYK, YCbCr, Lab."""
_ALPHA = frozenset({1, 2, 999})  # 999: as Corel Draw 10 writes it
_RAW_PHOTOMETRIC = frozenset({32803, 34892})
_FIX = "convert it to RGB or grey"
_COUNTED = frozenset({258, 273, 324, 338, 339})
"""Tags with a value for each band, strip or tile: Pillow makes an object of each value."""
_SIZES = {3: 2, 4: 4, 8: 2, 9: 4, 13: 4, 16: 8}
"""Bytes of a value by the type of a tag."""


@dataclass(frozen=True)
class TiffLayout:
    """The bands of a TIFF.

    Attributes:
        bands: number of samples of a pixel.
        bits: bits of each sample, the most of all bands.
        kind: 1 unsigned, 2 signed, 3 floating point, 4 undefined, 5 and 6 complex (TIFF's ``SampleFormat``).
        photometric: TIFF's ``PhotometricInterpretation``; -1 if it is missing.
        is_planar: whether bands are stored one after the other.
        extra: meaning of each band beyond the colours (TIFF's ``ExtraSamples``).
        parts: number of strips or tiles, or of values for bands if there are more.
    """

    bands: int
    bits: int
    kind: int
    photometric: int
    is_planar: bool
    extra: tuple[int, ...]
    parts: int

    def __str__(self) -> str:
        """Return what the file is, such as ``TIFF with 13 bands of 16 bits``."""
        bands = f"{self.bands} band{'' if self.bands == 1 else 's'}"
        numbers = {2: "signed ", 3: "floating-point ", 5: "complex ", 6: "complex "}.get(self.kind, "")
        order = ", one band after the other (planar)" if self.is_planar and self.bands > 1 else ""
        return f"TIFF with {bands} of {self.bits}-bit {numbers}numbers{order}"

    @property
    def fault(self) -> str | None:
        """Why Pillow would read other pixels than the file holds; None if it reads them rightly."""
        if self.parts > MAX_PARTS:
            return f"a TIFF of {self.parts} strips or tiles, more than {MAX_PARTS}: save it with larger ones"
        colours = _COLOUR_BANDS.get(self.photometric, 1)
        if self.photometric in _RAW_PHOTOMETRIC:
            return f"{self} from a camera's sensor: convert it to JPEG"
        has_alpha = any(value in _ALPHA for value in self.extra[:1]) or not self.extra
        if self.bands > colours + has_alpha:
            known = f"add --channels {self.bands}, or " if self.bands <= MOST_CHANNELS else ""
            return f"{self}: {known}convert one or three of the bands"
        if self.bits > 8 and (self.bands == 2 or (self.is_planar and self.bands > 1)):
            return f"{self}: {_FIX}"
        if self.kind == 2 and self.bits == 8:
            return f"{self}: convert it to unsigned numbers"
        return None

    @property
    def refusal(self) -> str:
        """Why Pillow does not read it, where it does not."""
        return f"{self}, which is not read: {_FIX}, with 8 or 16 bits"


def read_layout(file: BinaryIO) -> TiffLayout | None:
    """Return the layout of a TIFF's first page, or None if its header is damaged.

    Args:
        file: at its start; its position changes.
    """
    try:
        head = file.read(8)
        if head[2:4] in (b"+\0", b"\0+"):  # BigTIFF
            head += file.read(8)
        tags: Any = ImageFileDirectory_v2(head)
        file.seek(tags.next)
        tags.load(file)
        parts = _count_parts(tags)
        if parts > MAX_PARTS:  # looking at them takes as long as decoding
            return TiffLayout(1, 1, 1, -1, False, (), parts)
        bits, kinds = tags.get(258, (1,)), tags.get(339, (1,))
        layout = TiffLayout(
            bands=int(tags.get(277, 1)),
            bits=int(max(bits)),
            kind=int(max(kinds)),
            photometric=int(tags.get(262, -1)),
            is_planar=tags.get(284, 1) == 2,
            extra=tuple(map(int, tags.get(338, ()))),
            parts=parts,
        )
    except MemoryError:
        raise
    except Exception:
        return None
    is_whole = 256 in tags and 257 in tags and (273 in tags or 324 in tags)  # size, and strips or tiles
    return layout if layout.bands > 0 and is_whole else None


def _count_parts(tags: Any) -> int:
    """Return the number of strips or tiles, or that of bands' values if it is larger."""
    held = {tag: len(tags._tagdata[tag]) // _SIZES.get(tags.tagtype[tag], 1) for tag in _COUNTED & set(tags)}
    return max(held.values(), default=0)
