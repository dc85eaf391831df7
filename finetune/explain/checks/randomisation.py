"""Does a map depend on what the network has learned? (Adebayo et al., arXiv:1810.03292)

The weights are made random from the top down: the head first, then the upper half of the stages, then all. A
map that stays as it was shows the edges of the image, and not what the network learned of the class. Guided
backpropagation and the deconvnet stay nearly as they were by nature.

The values of each weight tensor are shuffled, so that their distribution, and with it the scale of the
activations, stays.

Shape legend: B batch, h w positions of a map.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from finetune.explain.attribution.heat_map import HeatMap, MakeCompute
from finetune.explain.rank_correlation import correlate_ranks
from pretrained.graph.stages import Stage

MOST_SIMILAR = 0.75
"""Largest mean rank correlation, at any step, of a map that depends on the weights. With the head of
EfficientNet-Lite0 at random, it was 0.3 for Grad-CAM and 0.5 for the gradient, and 0.98 or more for guided
backpropagation, the deconvnet and a map of edges."""
FEWEST_MAPS = 4
"""Maps that each step is judged by at least: with fewer images the weights are made random several times,
since two coarse maps may well be alike by chance."""


def measure_randomisation(
    network: nn.Module,
    stages: Sequence[Stage],
    make: MakeCompute,
    images: Tensor,
    classes: Sequence[int],
    maps: Sequence[HeatMap],
) -> dict[str, float]:
    """Return how similar maps stay when the weights become random, from the top down.

    Args:
        network: the network in eval mode; a copy is changed, and not the network.
        stages: its stages, from stem to head.
        make: makes the function that computes maps of a network.
        images: (B, 3, H, W), normalised.
        classes: B class indices; they stay the same.
        maps: the maps of the network itself, B of them; images without one are left out.

    Returns:
        The mean rank correlation of the maps with those of the network itself, in [-1, 1], by the last stage
        that was made random; a map without values counts as 0. Empty if no image has a map.
    """
    known = [index for index, heat in enumerate(maps) if heat.values is not None]
    if not known:
        return {}
    found: dict[str, list[float]] = {}
    for seed in range(max(1, FEWEST_MAPS // len(known))):
        for name, other in randomise_from_top(network, stages, seed):
            now = make(other)(images[known], [classes[index] for index in known])
            similar = [_correlate(maps[index], heat) for index, heat in zip(known, now, strict=True)]
            found.setdefault(name, []).extend(similar)
    return {name: float(np.mean(similar)) for name, similar in found.items()}


def randomise_from_top(
    network: nn.Module, stages: Sequence[Stage], seed: int = 0
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the same copy of a network with more and more random weights, and the last stage changed so far.

    Args:
        network: is copied.
        stages: its stages, from stem to head.
        seed: of the shuffling; the global random state is not used.
    """
    changed, generator = copy.deepcopy(network), torch.Generator().manual_seed(seed)
    parameters = dict(changed.named_parameters())
    shown = {len(stages) - 1, len(stages) // 2, 0}
    for number in reversed(range(len(stages))):
        for name in stages[number].parameters:
            _shuffle(parameters[name], generator)
        if number in shown:
            yield stages[number].name, changed


@torch.no_grad()
def _shuffle(parameter: nn.Parameter, generator: torch.Generator) -> None:
    order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
    parameter.copy_(parameter.flatten()[order].view_as(parameter))


def _correlate(before: HeatMap, now: HeatMap) -> float:
    """Return the rank correlation (Spearman) of two maps; 0 if one of them has no values."""
    if before.values is None or now.values is None:
        return 0.0
    return correlate_ranks(before.values.numpy(), now.values.numpy())
