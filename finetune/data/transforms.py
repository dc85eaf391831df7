"""From a picture to a tensor: the evaluation view is timm's, the training views are torchvision's.

Every view ends in float32 (3, H, W), normalised. Training views draw from torch's generator, which the
loader seeds for each picture. (timm's RandAugment is not used: it asks Pillow for zero bits of colour at
its highest magnitude, which Pillow refuses.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from finetune.recipe import Augmentation
from pretrained.catalog import Preprocessing

Transform = Callable[[Image.Image], Tensor]

_SMALLEST_CROP = {"light": 0.5, "medium": 0.5, "heavy": 0.2}
"""Smallest share of the picture's area in a random crop. ImageNet training goes down to 0.08; a small set
cannot afford that many views without the object in them."""


def build_eval_transform(preprocessing: Preprocessing) -> Transform:
    """Return the view that evaluation, prediction and the exported model use."""
    transform: Transform = create_transform(**preprocessing.to_timm(), is_training=False)
    return transform


def build_train_transform(preprocessing: Preprocessing, augmentation: Augmentation) -> Transform:
    """Return the random training view, or the evaluation view for ``none``."""
    if augmentation == "none":
        return build_eval_transform(preprocessing)
    filter_ = InterpolationMode(preprocessing.interpolation)
    crop = v2.RandomResizedCrop(
        preprocessing.img_size,
        scale=(_SMALLEST_CROP[augmentation], 1.0),
        interpolation=filter_,
        antialias=True,
    )
    steps = [crop, v2.RandomHorizontalFlip(), *_distortions(augmentation, preprocessing)]
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    steps += [v2.Normalize(list(preprocessing.mean), list(preprocessing.std))]
    if augmentation == "heavy":
        steps.append(v2.RandomErasing(p=0.25, value="random"))  # arXiv:1708.04896
    return _PlainTensor(v2.Compose(steps))


def _distortions(augmentation: Augmentation, preprocessing: Preprocessing) -> list[Any]:
    """Colour and shape: none, one operation of any strength, or several strong ones."""
    keys: dict[str, Any] = {
        "interpolation": InterpolationMode.BILINEAR,
        "fill": [round(255 * channel) for channel in preprocessing.mean],
    }
    if augmentation == "medium":
        return [v2.TrivialAugmentWide(**keys)]  # arXiv:2103.10158: nothing to tune
    if augmentation == "heavy":
        return [v2.RandAugment(num_ops=2, magnitude=9, **keys)]  # arXiv:1909.13719
    return []


class _PlainTensor:
    """Strip torchvision's tensor subclass, which slows every later operation down."""

    def __init__(self, transform: Callable[[Image.Image], Any]) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image) -> Tensor:
        tensor: Tensor = self.transform(image).as_subclass(Tensor)
        return tensor
