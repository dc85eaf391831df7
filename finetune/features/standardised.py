"""Features of training images with mean 0 and deviation 1, read block by block: they need not fit in memory.

Shape legend: N training images, D features, R directions in which the images differ (R <= N, D).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.errors import InternalError
from finetune.features.rows import Rows

SMALLEST_STD = 0.1
"""Smallest standard deviation of a feature, as a share of the mean one; as in ``training.standardize``."""
_BLOCK_BYTES = 64 * 2**20
"""Bytes of float64 features that are in memory at once."""
_PANEL = 1024
_RANK = 1e-12
"""Smallest squared deviation of a direction, as a share of the largest; anything less is rounding."""


@dataclass(frozen=True, eq=False)
class Standardised:
    """Features of training images with mean 0 and deviation 1.

    Attributes:
        mean: (D,) float64, on the device of the blocks.
        std: (D,) float64, positive, on the same device.
    """

    rows: Rows
    indices: Tensor
    mean: Tensor
    std: Tensor

    def columns(self, start: int, stop: int, images: Tensor | None = None) -> Tensor:
        """Return (N, stop - start) float64, or those of other images (B,), by their indices into all rows."""
        images = self.indices if images is None else images
        block = self.rows.columns(images, start, stop).to(self.mean.device).double()
        return block.sub_(self.mean[start:stop]).div_(self.std[start:stop])

    def take(self, places: Tensor) -> Tensor:
        """Return the features of some of the images, (B, D) float64, by their places (B,) in ``indices``."""
        return self.take_others(self.indices[places])

    def take_others(self, images: Tensor) -> Tensor:
        """Return the features of any images, (B, D) float64, by their indices (B,) into all rows."""
        return (self.rows[images].to(self.mean.device).double() - self.mean) / self.std

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of columns that fit in memory."""
        return _blocks(len(self.mean), len(self.indices))

    def gather(self) -> Tensor:
        """Return all features, (N, D) float32."""
        return torch.cat([self.columns(start, stop).float() for start, stop in self.blocks()], dim=1)

    def directions(self) -> tuple[Tensor, Tensor]:
        """Return U (N, R) and S^2 (R,) of Z Z' = U S^2 U', Z being the features.

        The products (N, N) are summed in float64 over blocks of features.
        """
        return find_directions(self._products())

    def _products(self) -> Tensor:
        """Return the lower triangle of Z Z', (N, N) float64."""
        number = len(self.indices)
        products = self.mean.new_zeros(number, number)
        for start, stop in self.blocks():
            block = self.columns(start, stop)
            for top in range(0, number, _PANEL):
                panel = slice(top, top + _PANEL)
                products[panel, : top + _PANEL] += block[panel] @ block[: top + _PANEL].T
        return products


def find_directions(products: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvectors (M, R) and eigenvalues (R,) of products of features, without those of rounding.

    Args:
        products: (M, M) float64, of which only the lower triangle is read.
    """
    squares, vectors = torch.linalg.eigh(products)
    seen = squares > _RANK * squares.max().clamp_min(1)
    return vectors[:, seen], squares[seen]


def standardise(rows: Rows, indices: Tensor, device: torch.device) -> Standardised:
    """Return features of images with mean 0 and deviation 1.

    Args:
        rows: (all images, D).
        indices: (N,) int64, the training images; no others are read.
        device: device of what is computed.

    Raises:
        InternalError: a feature is not finite.
    """
    blocks = _blocks(rows.shape[1], len(indices))
    measured = (rows.columns(indices, start, stop).to(device).double() for start, stop in blocks)
    moments = [torch.var_mean(block, dim=0, correction=0) for block in measured]
    std = torch.cat([variance for variance, _ in moments]).sqrt()
    if not std.isfinite().all():
        fix = "Please report this, with the command."
        raise InternalError("solving a linear classifier", "a feature is not finite", fix)
    floor = SMALLEST_STD * std.mean().item() or 1.0  # where all images are the same, all is zero
    return Standardised(rows, indices, torch.cat([mean for _, mean in moments]), std.clamp_min(floor))


def _blocks(num_columns: int, num_rows: int) -> Iterator[tuple[int, int]]:
    width = max(1, _BLOCK_BYTES // (8 * num_rows))
    for start in range(0, num_columns, width):
        yield start, min(start + width, num_columns)
