"""How an image, or an array, becomes the input of a network."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

IMAGE_CHANNELS = 3
"""Channels of an image: red, green and blue."""


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a tensor. Training, evaluation and export use the same object.

    Attributes:
        img_size: height and width of the network's input in pixels.
        crop_pct: side of the centre crop relative to the resized short side, in (0, 1].
        crop_mode: ``center``, ``squash`` or ``border``, as in timm.
        interpolation: name of a Pillow filter in lower case.
        mean: subtracted from the channels of an RGB image in [0, 1].
        std: divisor of the channels.
        value_range: values that become black and white in images of more than 8 bits; None if unknown.
        channels: C of the input; other than 3 if the network takes arrays and no images (a board of Go).
            Arrays are not normalised.
    """

    img_size: int = 224
    crop_pct: float = 0.875
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    value_range: tuple[float, float] | None = None
    channels: int = IMAGE_CHANNELS

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height, width of one input tensor."""
        return (self.channels, self.img_size, self.img_size)

    @property
    def takes_images(self) -> bool:
        """Whether the input is an RGB image, and not an array of planes."""
        return self.channels == IMAGE_CHANNELS

    @property
    def view_bytes(self) -> int:
        """Bytes of one input on its way to the device: uint8 for images, float32 for arrays."""
        return math.prod(self.input_size) * (1 if self.takes_images else 4)

    def to_dict(self) -> dict[str, Any]:
        """Return the values with the recipe's keys (section ``input``), and the range of values if known."""
        values = {key: value for key, value in asdict(self).items() if value is not None}
        del values["channels"]
        return values

    def to_timm(self) -> dict[str, Any]:
        """Return the values with timm's keys (``data_config``)."""
        values = asdict(self) | {"input_size": self.input_size}
        del values["img_size"], values["value_range"], values["channels"]
        return values
