"""Projections of the strongest units of feature maps, and how much of them the network's weights decide.

Shape legend: B units and their images, H W pixels, h w pixels of the box that a unit sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from finetune.explain.checks.randomisation import randomise_from_top
from finetune.explain.commands.strongest import Excited, read_excited
from finetune.explain.deconv import project_units
from finetune.explain.positions import MapPosition
from finetune.explain.rank_correlation import correlate_ranks
from finetune.explain.relu_rules import Rule
from finetune.features.network import Network
from finetune.plots.units import draw_projection

Floats = NDArray[np.float32]


def project(
    model: nn.Module, position: MapPosition, pixels: Tensor, excited: Sequence[Excited], rule: Rule
) -> Floats:
    """Return the projections (B, 3, H, W) of some units.

    Args:
        model: the network.
        position: the layer of the units.
        pixels: (B, 3, H, W), their images, normalised.
        excited: B units.
        rule: ``deconv`` or ``guided``.

    Raises:
        UsageError: there is no rule for an activation below the layer.
    """
    units = [one.unit for one in excited]
    found: Floats = project_units(model, position, pixels, units, rule).float().cpu().numpy()
    return found


def draw_projected(projection: Floats, one: Excited) -> Image.Image:
    """Return the projection (3, H, W) of a unit as an image of the pixels that it sees."""
    return draw_projection(_crop(projection, one))


def measure_randomisation(
    network: Network,
    position: MapPosition,
    excited: Sequence[Excited],
    projections: Sequence[Floats],
    rule: Rule,
) -> dict[str, Any]:
    """Compare projections with those of the same units when all weights are random (arXiv:1810.03292).

    Args:
        network: the network.
        position: the layer of the units.
        excited: a few units, such as the strongest of each feature map.
        projections: the projection (3, H, W) of each.
        rule: ``deconv`` or ``guided``.

    Returns:
        ``rank_correlation``, the mean over the units of Spearman's correlation of the strengths of the two
        projections in the pixels that the unit sees, and a sentence, ``said``.
    """
    if not excited:
        return {"rank_correlation": None, "said": "No image excites these feature maps."}
    *_, (_, random) = randomise_from_top(network.backbone.network, network.backbone.stages)
    others = project(random, position, read_excited(network, excited).pixels, excited, rule)
    similar = [
        _correlate(_crop(found, one), _crop(other, one))
        for one, found, other in zip(excited, projections, others, strict=True)
    ]
    mean = float(np.mean(similar))
    said = (
        f"With all weights made random, the strengths of these projections correlate by {mean:.2f} with "
        "those shown. The nearer to one, the more they show the image, and not what the network learned."
    )
    return {"rank_correlation": mean, "num_units": len(excited), "said": said}


def _crop(projection: Floats, one: Excited) -> Floats:
    top, left, bottom, right = one.box
    return projection[:, top:bottom, left:right]


def _correlate(one: Floats, other: Floats) -> float:
    """Return the rank correlation of the strengths (h, w); 0 if one of them is the same everywhere."""
    first, second = (np.abs(projection).max(axis=0) for projection in (one, other))
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return correlate_ranks(first, second)
