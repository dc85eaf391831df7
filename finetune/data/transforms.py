"""From a picture to a tensor: timm's transforms, from the one preprocessing that the run saves.

Every view ends in float32 (3, H, W), normalised. Training views draw from torch's, NumPy's and Python's
generators, which the loader seeds for each picture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from PIL import Image
from timm.data import create_transform
from torch import Tensor

from pretrained.catalog import Preprocessing

Augmentation = Literal["none", "light", "medium", "heavy"]
Transform = Callable[[Image.Image], Tensor]

_CROP_AND_FLIP: dict[str, Any] = {
    # ImageNet training crops down to 8 % of the picture. A small set cannot afford that many views
    # without the object in them.
    "scale": (0.5, 1.0),
    "hflip": 0.5,
    "color_jitter": None,
}
PRESETS: dict[str, dict[str, Any]] = {
    "light": _CROP_AND_FLIP,
    # One random operation of random strength, which needs no tuning: TrivialAugment (arXiv:2103.10158)
    # in timm's spelling.
    "medium": _CROP_AND_FLIP | {"auto_augment": "rand-n1-m5-mstd100-inc1"},
    # The usual ImageNet set: RandAugment (arXiv:1909.13719) and random erasing (arXiv:1708.04896).
    "heavy": {
        "scale": (0.2, 1.0),
        "hflip": 0.5,
        "color_jitter": None,
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "re_prob": 0.25,
        "re_mode": "pixel",
    },
}


def build_eval_transform(preprocessing: Preprocessing) -> Transform:
    """Return the view that evaluation, prediction and the exported model use."""
    transform: Transform = create_transform(**preprocessing.to_timm(), is_training=False)
    return transform


def build_train_transform(preprocessing: Preprocessing, augmentation: Augmentation) -> Transform:
    """Return the random training view, or the evaluation view for ``none``."""
    if augmentation == "none":
        return build_eval_transform(preprocessing)
    values = preprocessing.to_timm()
    values.pop("crop_pct"), values.pop("crop_mode")  # a random crop has its own scale
    transform: Transform = create_transform(**values, is_training=True, **PRESETS[augmentation])
    return transform
