"""How features and the answer change when the image is moved, scaled or turned.

After Zeiler and Fergus (arXiv:1311.2901, figure 5): the distance between the features of the original and of
the transformed image, layer by layer, and the probability of the true class. What the image leaves free is
filled with the mean colour, as there.

Shape legend: B batch, A amounts of a transformation, L layers, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as images_of

from pretrained.graph.recorder import FeaturePoint, FeatureRecorder
from pretrained.graph.structures import tensors_in

AMOUNTS: Mapping[str, tuple[float, ...]] = {
    "translation": tuple(step / 40 for step in range(-10, 11, 2)),
    "scale": tuple(1 + step / 10 for step in range(9)),
    "rotation": tuple(float(degrees) for degrees in range(0, 361, 15)),
}
"""Downwards as a share of the height; the factor by which the image grows; degrees anticlockwise."""
IDENTITY = {"translation": 0.0, "scale": 1.0, "rotation": 0.0}
"""The amount that changes nothing."""
_TURN = 360.0


@dataclass(frozen=True)
class Responses:
    """What one transformation changes.

    Attributes:
        distances: (L, B, A) float32, the Euclidean distance of the features from those of the original image,
            divided by the norm of the latter.
        answers: (B, A) float32, the probability of the class of each image, in [0, 1], or its number.
    """

    distances: Tensor
    answers: Tensor


def transform_images(images: Tensor, kind: str, amount: float) -> Tensor:
    """Return transformed images.

    Args:
        images: (B, 3, H, W) normalised, so that zero is the mean colour.
        kind: ``translation``, ``scale`` or ``rotation``.
        amount: in the unit of :data:`AMOUNTS`.
    """
    if amount == IDENTITY[kind] or (kind == "rotation" and amount % _TURN == 0):
        return images
    down = round(amount * images.shape[-2]) if kind == "translation" else 0
    changed: Tensor = images_of.affine(
        images,
        angle=-amount if kind == "rotation" else 0.0,
        translate=[0.0, float(down)],
        scale=amount if kind == "scale" else 1.0,
        shear=[0.0, 0.0],
        interpolation=InterpolationMode.BILINEAR,
        fill=[0.0],
    )
    return changed


@torch.inference_mode()
def measure_responses(
    network: nn.Module,
    points: Sequence[FeaturePoint],
    images: Tensor,
    outputs: Tensor,
    kind: str,
    activate: Callable[[Tensor], Tensor],
) -> Responses:
    """Measure how features and answers respond to one transformation.

    Args:
        network: (B, 3, H, W) -> outputs (B, K), in eval mode.
        points: the layers, L of them.
        images: (B, 3, H, W), normalised, on the device of the network.
        outputs: (B,) int64, the output that is followed for each image.
        kind: a key of :data:`AMOUNTS`; all its amounts are measured, one forward pass each.
        activate: returns the answers (B, K) that outputs (B, K) mean.
    """
    recorder = FeatureRecorder(network, points, [_to_rows] * len(points))
    originals = recorder.record(images)
    distances, answers = [], []
    for amount in AMOUNTS[kind]:
        features, output = recorder.record_all(transform_images(images, kind, amount))
        distances.append(
            torch.stack([_compare(*pair) for pair in zip(originals, features, strict=True)]).cpu()
        )
        found = activate(tensors_in(output)[0].float()).cpu()
        answers.append(found.gather(1, outputs[:, None])[:, 0])
    return Responses(torch.stack(distances, dim=2), torch.stack(answers, dim=1))


def _to_rows(value: object) -> list[Tensor]:
    """Return copies of the tensors of a layer, since a later operation in place may overwrite them."""
    return [tensor.float().clone() for tensor in tensors_in(value) if tensor.is_floating_point()]


def _compare(original: Sequence[Tensor], changed: Sequence[Tensor]) -> Tensor:
    """Return the relative distance of the features of each image, (B,)."""
    one, other = (torch.cat([tensor.flatten(1) for tensor in rows], dim=1) for rows in (original, changed))
    norm = one.norm(dim=1).clamp_min(torch.finfo(one.dtype).tiny)
    distances: Tensor = (other - one).norm(dim=1) / norm
    return distances
