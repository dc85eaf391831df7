"""A heat map: where in an image the evidence for a class is, or why there is no such map.

Shape legend: B batch, h w positions of the map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

NO_EVIDENCE = "nothing in the image is evidence for this: the map has no positive value"
CONSTANT = "the map has the same value everywhere"
NOT_FINITE = "the gradient is not finite"
ONE_CELL = "the map has a single cell"
_FAINT = 1e-6
"""Differences of at most this share of the largest magnitude are rounding errors."""


@dataclass(frozen=True)
class HeatMap:
    """Where the evidence for a class is.

    Attributes:
        values: (h, w) float32 on the CPU, from 0 (none) to 1 (most); None if there is no map.
        reason: why there is none.
    """

    values: Tensor | None
    reason: str = ""


ComputeMaps = Callable[[Tensor, Sequence[int]], list[HeatMap]]
"""Takes images (B, 3, H, W), normalised, and a class index for each; returns a map for each."""
MakeCompute = Callable[[nn.Module], ComputeMaps]
"""Takes a network and returns the function that computes its maps."""


def to_heat_map(evidence: Tensor) -> HeatMap:
    """Return the positive part of the evidence, relative to its maximum; a map that says nothing is refused.

    Args:
        evidence: (h, w) in any unit; negative values speak against the class.
    """
    if evidence.numel() <= 1:
        return HeatMap(None, ONE_CELL)
    if not evidence.isfinite().all():
        return HeatMap(None, NOT_FINITE)
    peak, largest = evidence.max(), evidence.abs().max()
    if peak <= _FAINT * largest:
        return HeatMap(None, NO_EVIDENCE)
    if peak - evidence.min() <= _FAINT * largest:
        return HeatMap(None, CONSTANT)
    return HeatMap((evidence / peak).clamp_min(0).float().cpu())
