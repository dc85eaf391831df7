"""The effective receptive field: where the gradient of a unit with respect to pixels is (arXiv:1701.04128).

Of the pixels that a unit can see, those in the middle count most: there are more paths to them. The share of
the gradient's magnitude in a square around the centre says how much of the window a trained network uses.

Shape legend: B batch, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from finetune.explain.positions import MapPosition
from finetune.explain.units import record_maps


def measure_gradient_mass(
    network: nn.Module, positions: Sequence[MapPosition], images: Tensor, seed: int = 0
) -> list[Tensor]:
    """Return, for each layer, the share (H, W) of each pixel in the gradient of the unit in the middle.

    The gradient of a sum of all channels with random signs is taken, so that channels do not cancel each
    other everywhere; its magnitude is averaged over images and colours. The shares of a map add up to one;
    they are zero if there is no gradient.

    Args:
        network: a network in eval mode; it does not change.
        positions: the layers, at least one.
        images: (B, 3, H, W), normalised.
        seed: seed of the signs.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad():
        pixels = images.detach().clone().requires_grad_()
        layers = record_maps(network, positions, pixels * 1)
        masses = []
        for maps in layers:
            middle = maps[:, :, maps.shape[2] // 2, maps.shape[3] // 2]
            signs = torch.randint(0, 2, middle.shape, generator=generator).to(middle) * 2 - 1
            [slope] = torch.autograd.grad((middle * signs).sum(), [pixels], retain_graph=True)
            masses.append(slope.abs().mean(dim=(0, 1)).cpu().double())
    return [mass / mass.sum() if mass.sum() > 0 else mass for mass in masses]


def find_effective_size(mass: Tensor, centre: tuple[float, float], share: float) -> int:
    """Return the side in pixels of the smallest square around a centre with a share of the gradient.

    It is 0 if there is no gradient.

    Args:
        mass: (H, W), shares of the pixels, of :func:`measure_gradient_mass`.
        centre: (vertical, horizontal), from the top left corner of the image.
        share: in (0, 1).
    """
    rows = (torch.arange(mass.shape[0]) + 0.5 - centre[0]).abs()
    columns = (torch.arange(mass.shape[1]) + 0.5 - centre[1]).abs()
    distances = torch.maximum(rows[:, None], columns[None, :]).flatten()
    if not mass.any():
        return 0
    order = distances.argsort()
    reached = mass.flatten()[order].cumsum(0) >= share * mass.sum()
    furthest = distances[order][reached][0]
    return round(2 * float(furthest) + 1)
