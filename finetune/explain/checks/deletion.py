"""Does the class score fall faster if the marked pixels are deleted first? (Petsiuk et al., arXiv:1806.07421)

The image is cut into 8 x 8 cells. Cells are replaced by the mean that the network subtracts, an eighth of
them at a time, in the order of the map. (The mean colour of the image itself would tell what was deleted.)
For comparison the same map is moved to random places of the image. The advantage of the map is the area
between the two curves: how much lower the score is, on average, than after deleting as many cells in the same
pattern somewhere else. It is about zero for a map that marks nothing in particular, and below zero for one
that marks the wrong places.

Single cells drawn at random would be no fair comparison: scattered over the image they leave no part of the
object whole, so that they lower the score faster than the best of maps.

The score is the log odds of the class, so that neither a probability near 1 nor one near 0 hides a change; of
a number it is the number, in standard deviations.

Shape legend: B batch, H W pixels, S steps, R random places, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.explain.attribution.heat_map import HeatMap
from finetune.targets import SINGLE, Target
from pretrained.graph.structures import tensors_in

CELLS = 8
"""Cells along each side of an image."""
STEPS = 8
"""Steps from the whole image to an image without a cell; both ends are the same for every order."""
PLACES = 3
"""Random places to which each map is moved."""
Advantages = list[float]
"""The advantage of the map of one image over each of the random places, in nats."""
_LEAST_SHIFT = 2
"""Cells by which a map is moved at least, up or down or to a side; it enters again at the other edge."""


def measure_advantage(
    network: nn.Module,
    images: Tensor,
    classes: Sequence[int],
    maps: Sequence[HeatMap],
    steps: int = STEPS,
    places: int = PLACES,
    target: Target = SINGLE,
) -> list[Advantages | None]:
    """Return how much lower the class score is, in nats, when marked cells are deleted before random ones.

    The network is run forward ``(steps - 1) (1 + places)`` times. The places depend on the pixels of the
    image alone, neither on the other images nor on the global random state.

    Args:
        network: (B, 3, H, W) -> (B, K), in eval mode, on the device of the images; it is not modified.
        images: (B, 3, H, W) float32, normalised.
        classes: B class indices in [0, K).
        maps: the maps of the images, B of them.
        steps: S, at least 2.
        places: R, at least 1.
        target: what the network's outputs are.

    Returns:
        For each image the area between the two curves, per share of the image, for each of the R places;
        None without a map.
    """
    known = [index for index, heat in enumerate(maps) if heat.values is not None]
    if not known:
        return [None] * len(maps)
    orders = torch.stack([_draw_orders(maps[index], images[index], places) for index in known])
    chosen, wanted = images[known], torch.tensor([classes[index] for index in known])
    curves = [_measure_curve(network, chosen, wanted, order, steps, target) for order in orders.unbind(dim=1)]
    advantages = (torch.stack(curves[1:], dim=1) - curves[0][:, None]).mean(dim=2).tolist()
    found = dict(zip(known, advantages, strict=True))
    return [found.get(index) for index in range(len(maps))]


def _draw_orders(heat: HeatMap, image: Tensor, places: int) -> Tensor:
    """Return the order of the cells by a map and by the same map at random places: (1 + R, CELLS**2)."""
    generator = torch.Generator().manual_seed(crc32(image.cpu().numpy().tobytes()))
    cells = _find_cells(heat, image.shape[1:])
    moved = [_move(cells, generator) for _ in range(places)]
    return torch.stack([_order(one, generator) for one in (cells, *moved)])


def _find_cells(heat: HeatMap, size: Sequence[int]) -> Tensor:
    """Return the mean of a map in each cell, (CELLS, CELLS)."""
    assert heat.values is not None
    fine = F.interpolate(heat.values[None, None], tuple(size), mode="bilinear")
    return F.adaptive_avg_pool2d(fine, CELLS)[0, 0]


def _move(cells: Tensor, generator: torch.Generator) -> Tensor:
    """Return the cells at a random place, and in half of the cases as in a mirror."""
    shifts = [
        (down, right)
        for down in range(CELLS)
        for right in range(CELLS)
        if max(min(down, CELLS - down), min(right, CELLS - right)) >= _LEAST_SHIFT
    ]
    shift = shifts[int(torch.randint(len(shifts), (), generator=generator))]
    is_mirrored = bool(torch.randint(2, (), generator=generator))
    return torch.roll(cells.flip(1) if is_mirrored else cells, shift, (0, 1))


def _order(cells: Tensor, generator: torch.Generator) -> Tensor:
    """Return the cells (CELLS**2,) from the most marked to the least; equal ones in random order."""
    shuffled = torch.randperm(cells.numel(), generator=generator)
    return shuffled[cells.flatten()[shuffled].argsort(descending=True, stable=True)]


def _measure_curve(
    network: nn.Module, images: Tensor, classes: Tensor, order: Tensor, steps: int, target: Target
) -> Tensor:
    """Return the evidence (B, S - 1) for the classes after each step but the last; lower is less evidence."""
    rank = order.argsort(dim=1).reshape(-1, 1, CELLS, CELLS)  # when each cell is deleted
    curve = []
    for step in range(1, steps):
        deleted = (rank < step * CELLS**2 / steps).to(images)
        mask = F.interpolate(deleted, images.shape[2:], mode="nearest")
        with torch.inference_mode():
            logits = tensors_in(network(images.masked_fill(mask > 0, 0)))[0].float().cpu()
        curve.append(target.find_evidence(logits).gather(1, classes[:, None])[:, 0])
    return torch.stack(curve, dim=1)
