"""Receptive fields: which pixels a unit of a feature map can see, exactly.

In a convolutional network the units of a layer see windows of one size at regular steps, until a window is
cut off by the border of the image. :func:`measure_fields` gives size, step and centre of a layer's windows;
:func:`find_boxes` gives the pixels of single units, cut off as they are. Both hold for any network, as they
follow its paths (:mod:`finetune.explain.dependencies`) and know no formulas: two convolutions of 3x3 see 5x5.
A squeeze-and-excitation, an attention, or a normalisation over positions lets every unit see the whole image.

Shape legend: B batch, C channels, H W pixels, h w positions of a map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from finetune.explain.dependencies import linear_replica, record_positive
from finetune.explain.positions import MapPosition
from finetune.explain.units import Box, Unit

_SCALES = (1, 2, 4)
"""Multiples of the input size at which windows are measured that the border cuts off at smaller ones."""


@dataclass(frozen=True)
class ReceptiveField:
    """The windows of one layer, in pixels as (vertical, horizontal).

    Attributes:
        size: height and width of a window that no border cuts off. None if each unit sees the whole image,
            or if windows differ by more than their place, as in attention within fixed windows.
        stride: step between the windows of neighbours; None where ``size`` is.
        first_centre: centre of the window of unit (0, 0), which may lie outside of the image, from the top
            left corner of the image; None where ``size`` is.
        box: the pixels that the unit in the middle of the map sees.
        map_size: (h, w) of the map.
    """

    size: tuple[int, int] | None
    stride: tuple[int, int] | None
    first_centre: tuple[float, float] | None
    box: Box
    map_size: tuple[int, int]


def find_boxes(
    network: nn.Module, position: MapPosition, input_size: tuple[int, int, int], units: Sequence[Unit]
) -> list[Box]:
    """Return the pixels that can change each of some units of one layer.

    The smallest box around them is returned; a dilated convolution leaves holes in it.

    Args:
        network: a network in eval mode, on any device; it does not change.
        position: the layer.
        input_size: (C, H, W) of the images.
        units: in any order; equal ones are computed once.
    """
    with linear_replica(network) as replica:
        image, [maps] = record_positive(replica, [position], input_size)
        return _Boxes(image, maps).of(units)


def measure_fields(
    network: nn.Module, positions: Sequence[MapPosition], input_size: tuple[int, int, int]
) -> list[ReceptiveField]:
    """Measure the receptive fields of some layers; they cost a few cheap forward passes.

    Where the border cuts off every window of a layer, larger images are tried, up to four times the size.

    Args:
        network: a network in eval mode, on any device; it does not change.
        positions: the layers, at least one.
        input_size: (C, H, W) of the images.
    """
    found: dict[int, ReceptiveField] = {}
    with linear_replica(network) as replica:
        for scale in _SCALES:
            left = [index for index in range(len(positions)) if index not in found or _is_cut(found[index])]
            if not left:
                break
            size = (input_size[0], scale * input_size[1], scale * input_size[2])
            try:
                measured = [*_measure(replica, [positions[index] for index in left], size)]
            except Exception:  # the forward of a network may refuse any size but its own with any error
                if scale == 1:
                    raise
                break
            for index, field in zip(left, measured, strict=True):
                before = found.setdefault(index, field)
                if field.size is not None:  # box and map stay those of the network's own input size
                    found[index] = ReceptiveField(
                        field.size, field.stride, field.first_centre, before.box, before.map_size
                    )
    return [found[index] for index in range(len(positions))]


def _is_cut(field: ReceptiveField) -> bool:
    return field.size is None


def _measure(
    replica: nn.Module, positions: Sequence[MapPosition], size: tuple[int, int, int]
) -> Iterator[ReceptiveField]:
    image, layers = record_positive(replica, positions, size)
    for maps in layers:
        yield _measure_layer(_Boxes(image, maps), (maps.shape[2], maps.shape[3]))


def _measure_layer(boxes: _Boxes, map_size: tuple[int, int]) -> ReceptiveField:
    """Find size, stride and centre from the corners of the map, and check them in its middle."""
    last, middle = (map_size[0] - 1, map_size[1] - 1), (map_size[0] // 2, map_size[1] // 2)
    places = [(0, 0), (min(1, last[0]), min(1, last[1])), middle, last]
    first, second, central, end = boxes.of([Unit(None, *place) for place in places])
    sides = [
        _find_side((first[axis], first[axis + 2]), second[axis + 2], end[axis], last[axis], limit)
        for axis, limit in ((0, boxes.image_size[0]), (1, boxes.image_size[1]))
    ]
    windows = [side for side in sides if side is not None]
    fits = len(windows) == 2 and all(
        _clip(window, middle[axis], boxes.image_size[axis]) == (central[axis], central[axis + 2])
        for axis, window in enumerate(windows)
    )
    if not fits:
        return ReceptiveField(None, None, None, central, map_size)
    rows, columns = windows
    return ReceptiveField(
        (rows.size, columns.size),
        (rows.stride, columns.stride),
        (rows.start + rows.size / 2, columns.start + columns.size / 2),
        central,
        map_size,
    )


class _Window(NamedTuple):
    """The windows of a layer along one axis: unit i sees ``size`` pixels from ``start + i * stride``."""

    start: int
    size: int
    stride: int


def _find_side(
    first: tuple[int, int], second_end: int, last_start: int, last: int, limit: int
) -> _Window | None:
    """Return the windows along one axis; None if the border hides their size.

    The border of the image cuts off the start of the first window and the end of the last one, but neither
    the end of the first nor the start of the last.

    Args:
        first: start and end of what the first unit sees.
        second_end: end of what the second sees.
        last_start: start of what the last sees.
        last: index of the last unit.
        limit: number of pixels.
    """
    stride = second_end - first[1]
    if second_end >= limit or last_start <= 0 or stride <= 0:
        return None
    start = last_start - last * stride
    return _Window(start, first[1] - start, stride)


def _clip(window: _Window, index: int, limit: int) -> tuple[int, int]:
    start = window.start + index * window.stride
    return max(0, start), min(limit, start + window.size)


class _Boxes:
    """The fields of the units of one map (1, C, h, w), which was computed from an image (1, C, H, W)."""

    def __init__(self, image: Tensor, maps: Tensor) -> None:
        self._image, self._maps = image, maps
        self.image_size = (image.shape[2], image.shape[3])

    def of(self, units: Sequence[Unit]) -> list[Box]:
        """Return the box of each unit."""
        known = {unit: self._find(unit) for unit in dict.fromkeys(units)}
        return [known[unit] for unit in units]

    def _find(self, unit: Unit) -> Box:
        column = self._maps[0, :, unit.row, unit.column]
        value = column.sum() if unit.channel is None else column[unit.channel]
        [slope] = torch.autograd.grad(value, [self._image], retain_graph=True)
        seen = slope[0].ne(0).any(dim=0)
        rows, columns = seen.any(dim=1).nonzero(), seen.any(dim=0).nonzero()
        return Box(int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)
