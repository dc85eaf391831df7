"""The images that excite each feature map most, from one pass over any number of images.

Of each batch only the strongest activation of every map is taken, and only the best few images of every map
are remembered: memory does not grow with the number of images. Where in these few images the strongest units
are, :func:`find_peaks` finds afterwards.

Shape legend: B images of a batch, C channels, h w positions of a map, K images that are remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from finetune.explain.positions import MapPosition
from finetune.explain.units import Unit, record_maps
from pretrained.graph.pooling import Form, to_map
from pretrained.graph.recorder import FeatureRecorder
from pretrained.graph.structures import tensors_in

_NONE = -1
"""Index of an image that is not there: there were fewer than K."""


class TopUnits:
    """The images that excite every map of one layer most, the best K of each.

    Args:
        most: K.

    Attributes:
        values: (K, C) float32, the strongest activations, in descending order; -inf where there are fewer.
        images: (K, C) int64, indices of the images; -1 where there are fewer. Of equal ones the first counts.
        num_images: number of images so far.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.values, self.images = torch.empty(0, 0), torch.empty(0, 0)
        self.num_images = 0

    def add(self, values: Tensor) -> None:
        """Take the next images into account.

        Args:
            values: (B, C), the strongest activation of each map. NaN counts as none.
        """
        values = values.float().nan_to_num(-torch.inf, torch.inf, -torch.inf).cpu()
        first, self.num_images = self.num_images, self.num_images + len(values)
        if not first:
            self.values = torch.full((self.most, values.shape[1]), -torch.inf)
            self.images = torch.full_like(self.values, _NONE, dtype=torch.int64)
        images = torch.arange(first, self.num_images)[:, None].expand_as(values)
        values, order = torch.cat([self.values, values]).sort(dim=0, descending=True, stable=True)
        self.values = values[: self.most].clone()
        self.images = torch.cat([self.images, images]).gather(0, order[: self.most])

    def strongest(self, channel: int) -> list[tuple[int, float]]:
        """Return (image, activation) of the best images of a map, the strongest first.

        Images in which the map has no positive activation excite it not at all; they are left out.
        """
        columns = self.images[:, channel].tolist(), self.values[:, channel].tolist()
        return [(image, value) for image, value in zip(*columns, strict=True) if image != _NONE and value > 0]

    def rank_maps(self) -> list[int]:
        """Return the maps with a positive activation in some image, by the mean of their best K images."""
        means = self.values.clamp_min(0).mean(dim=0)
        order = means.argsort(descending=True, stable=True)
        return [int(index) for index in order if means[index] > 0]


class TopRecorder:
    """Finds the best images of all maps of some layers, batch by batch.

    Args:
        network: a network in eval mode; it does not change.
        positions: the layers, at least one.
        most: number of images that are remembered for each map.

    Attributes:
        layers: what was found, in the order of the layers.
    """

    def __init__(self, network: nn.Module, positions: Sequence[MapPosition], most: int) -> None:
        self.layers = tuple(TopUnits(most) for _ in positions)
        points = [position.point for position in positions]
        self._recorder = FeatureRecorder(
            network, points, [partial(_find_strengths, form=position.form) for position in positions]
        )

    def add(self, images: Tensor) -> None:
        """Take the next images (B, 3, H, W) into account; their forward pass ends at the last layer."""
        with torch.inference_mode():
            found = self._recorder.record(images)
        for layer, values in zip(self.layers, found, strict=True):
            layer.add(values)


def _find_strengths(value: Any, form: Form) -> Tensor:
    """Return the strongest activation of each map (B, C), without a copy of the maps."""
    tensor = next(tensor for tensor in tensors_in(value) if tensor.is_floating_point())
    return to_map(tensor, form).amax(dim=(2, 3))


def find_peaks(network: nn.Module, position: MapPosition, images: Tensor) -> list[list[Unit]]:
    """Return the strongest unit of each map of a layer, C of them for each of B images.

    Args:
        network: a network in eval mode; it does not change.
        position: the layer.
        images: (B, 3, H, W), normalised.
    """
    with torch.inference_mode():
        [maps] = record_maps(network, [position], images)
    width = maps.shape[3]
    return [
        [Unit(channel, *divmod(place, width)) for channel, place in enumerate(places)]
        for places in maps.flatten(2).max(dim=2).indices.tolist()
    ]
