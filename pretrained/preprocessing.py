"""How an image, or an array, becomes the input of a network."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

ImgSize = int | tuple[int, int]
"""Pixels of the side of a square, or height and width."""
Resize = Literal["crop", "squash", "pad"]
"""How an image of another aspect ratio gets that of the network's input: it is cropped in the middle, its
aspect ratio is changed, or it is padded with the mean colour."""
_CROP_MODES: dict[Resize, str] = {"crop": "center", "squash": "squash", "pad": "border"}
"""timm's names."""
Kind = Literal["rgb", "bands", "array"]
"""What a network takes. ``rgb``: photographs, as 8-bit RGB. ``bands``: images of any number of channels and
bits, standardised by channel. ``array``: arrays of its very size, as they are (a board of Go)."""
IMAGE_CHANNELS = 3
"""Channels of a photograph: red, green and blue."""
MOST_CHANNELS = 16
"""Largest number of channels of bands."""


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a tensor. Training, evaluation and export use the same object.

    Attributes:
        img_size: size of the network's input in pixels; one number for a square, or height and width.
        crop_pct: side of the centre crop relative to the resized short side, in (0, 1].
        resize: how an image gets the aspect ratio of the input.
        interpolation: name of a Pillow filter in lower case.
        mean: subtracted from the channels, (C,): of RGB in [0, 1], of bands in the numbers of the files.
        std: divisor of the channels, (C,).
        value_range: values that become black and white in RGB of more than 8 bits; None if unknown.
        channels: C of the input.
        kind: what the network takes.
    """

    img_size: ImgSize = 224
    crop_pct: float = 0.875
    resize: Resize = "crop"
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    value_range: tuple[float, float] | None = None
    channels: int = IMAGE_CHANNELS
    kind: Kind = "rgb"

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height, width of one input tensor."""
        return (self.channels, *self.size)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the input in pixels."""
        return self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)

    @property
    def size_name(self) -> str:
        """The size as ``--img-size`` takes it: ``224``, or height and width as ``224x448``."""
        height, width = self.size
        return f"{height}" if height == width else f"{height}x{width}"

    @property
    def is_rgb(self) -> bool:
        """Whether the network takes photographs."""
        return self.kind == "rgb"

    @property
    def view_bytes(self) -> int:
        """Bytes of one input on its way to the device: uint8 for photographs, else float32."""
        return math.prod(self.input_size) * (1 if self.is_rgb else 4)

    def to_dict(self) -> dict[str, Any]:
        """Return the values with the recipe's keys (section ``input``), and the range of values if known."""
        values = {key: value for key, value in asdict(self).items() if value is not None}
        del values["kind"]
        return values | {"channels": self.channels if self.kind == "bands" else self.kind}

    def to_timm(self) -> dict[str, Any]:
        """Return the values with timm's keys (``data_config``)."""
        values = asdict(self) | {"input_size": self.input_size, "crop_mode": _CROP_MODES[self.resize]}
        for ours in ("img_size", "resize", "value_range", "channels", "kind"):
            del values[ours]
        return values


def to_img_size(height: int, width: int) -> ImgSize:
    """Return the shortest form of a size in pixels: one number for a square."""
    return height if height == width else (height, width)


def find_resize(crop_mode: Any) -> Resize:
    """Return the name of one of timm's crop modes.

    Raises:
        ValueError: timm has no such mode.
    """
    for name, mode in _CROP_MODES.items():
        if mode == crop_mode:
            return name
    raise ValueError(f"crop_mode is {repr(crop_mode)[:40]}, not one of {', '.join(_CROP_MODES.values())}")
