"""Nearest images by cosine similarity, and maps of all images in two dimensions (PCA, UMAP).

Rows are read in blocks: memory does not grow with their number.

Shape legend: N images, B of them in a block, D features for each, K components, M rows of a square matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.errors import EnvironmentFaultError, InternalError, UsageError
from finetune.features.rows import Rows

BLOCK_BYTES = 8 * 2**20
"""Bytes of a block of float64 rows. Larger blocks are slower, since their memory is allocated each time."""
LARGEST_MATRIX = 4096
"""Rows of the largest matrix whose eigenvectors are computed: 128 MB, and seconds on one core."""
SMALLEST_STD = 0.1
"""Least standard deviation of a feature, as a fraction of the mean one, as in ``training.standardize``."""
BEFORE_UMAP = 50
"""Number of principal components that UMAP gets: far fewer than features, with nearly the same variance."""
FEWEST_FOR_UMAP = 16
"""Smallest number of images for UMAP, which uses the 15 nearest neighbours of each."""
_TINY = torch.finfo(torch.float64).tiny
"""Divisor in place of zero."""
_EXTRA = 16
"""Additional directions of the subspace iteration; they make it converge faster."""
_ITERATIONS = 300
_TOLERANCE = 1e-9
"""Largest residual of an eigenvector, as a share of the largest eigenvalue."""


@dataclass(frozen=True)
class Plane:
    """Images as points in two dimensions.

    Attributes:
        points: (N, 2) float32, in the order that was asked for.
        shares: fractions of the total variance along the two axes; None for UMAP, whose axes have no meaning.
        num_fitted: number of images that the axes were fitted to.
    """

    points: Tensor
    shares: tuple[float, float] | None
    num_fitted: int


def find_nearest(
    rows: Rows, indices: Tensor, query: Tensor, top: int, advance: Callable[[int], None]
) -> list[tuple[int, float]]:
    """Return the images that are most like a query, by the cosine of the angle between rows.

    Every row is compared. Equal rows have equal similarities. A row of zeros has the similarity 0.

    Args:
        rows: (all images, D).
        indices: (N,) int64, the images to search, each once, in any order.
        query: (D,).
        top: number of images to return; all if there are fewer.
        advance: called with the number of images that were compared, N in total.

    Returns:
        (index, similarity from -1 to 1), the most similar first; of equal ones the lower index first.

    Raises:
        InternalError: the query or a row holds non-finite values.
    """
    wanted = query.to("cpu", torch.float64)
    wanted = wanted / _checked(wanted.norm()).clamp_min(_TINY)
    found, similarities = torch.empty(0, dtype=torch.int64), torch.empty(0)
    for part, block in _blocks(rows, indices.sort().values, advance):
        norms = _checked(block.norm(dim=1)).clamp_min(_TINY)
        # The last bits of a product depend on where in a block a row lies: float32 does not show them.
        cosines = (block @ wanted / norms).clamp(-1, 1).float()
        found, similarities = torch.cat([found, part]), torch.cat([similarities, cosines])
        order = similarities.argsort(descending=True, stable=True)[:top]
        found, similarities = found[order], similarities[order]
    return list(zip(found.tolist(), similarities.tolist(), strict=True))


def find_plane(rows: Rows, indices: Tensor, advance: Callable[[int], None]) -> Plane:
    """Return images on the plane of the first two principal components of their standardised features.

    Where both N and D are over ``LARGEST_MATRIX``, the axes are found with that many images, evenly spaced
    among ``indices``, and all are laid on them. A side of an axis means nothing: the number of an axis that
    is furthest from zero is made positive, so that the same rows give the same plane.

    Args:
        rows: (all images, D).
        indices: (N,) int64, N >= 1.
        advance: called with the number of rows that were read, :func:`count_reads` in total.

    Raises:
        InternalError: a row holds non-finite values.
    """
    points, shares, num_fitted = _components(rows, indices, 2, advance)
    return Plane(points, (shares[0], shares[1]), num_fitted)


def find_umap_plane(rows: Rows, indices: Tensor, advance: Callable[[int], None]) -> Plane:
    """Return images on a plane that keeps neighbours together (UMAP, arXiv:1802.03426).

    UMAP gets the first 50 principal components and a fixed seed. Only neighbourhoods have a meaning; axes and
    distances between groups have none.

    Args:
        rows: (all images, D).
        indices: (N,) int64.
        advance: called with the number of rows that were read, :func:`count_reads` in total; then UMAP runs
            without progress reports, half a minute for 20,000 images on one core.

    Raises:
        EnvironmentFaultError: as :func:`check_umap`.
        UsageError: there are fewer than 16 images.
        InternalError: a row holds non-finite values.
    """
    check_umap()
    if len(indices) < FEWEST_FOR_UMAP:
        found = f"it needs {FEWEST_FOR_UMAP} images, and there are {len(indices)}"
        raise UsageError("a plane by UMAP", found, "Take principal components.")
    points, _, num_fitted = _components(rows, indices, BEFORE_UMAP, advance)
    from umap import UMAP

    # With a fixed seed UMAP uses one thread; n_jobs=1 avoids its warning about that.
    plane = UMAP(n_components=2, random_state=0, n_jobs=1).fit_transform(points.numpy())
    return Plane(torch.from_numpy(plane).float(), None, num_fitted)


def check_umap() -> None:
    """Check that UMAP is installed; to be called before anything is computed.

    Raises:
        EnvironmentFaultError: umap-learn is not installed or cannot be loaded.
    """
    try:
        import umap  # noqa: F401
    except ImportError as error:
        fix = "Run `pip install umap-learn`, or take principal components."
        raise EnvironmentFaultError("a plane by UMAP", f"it needs umap-learn ({error})", fix) from None


def count_reads(rows: Rows, indices: Tensor) -> int:
    """Return the number of rows that :func:`find_plane` reads, including repeated reads."""
    return 2 * len(_fitted(rows, indices)) + len(indices)


def _blocks(rows: Rows, indices: Tensor, advance: Callable[[int], None]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield indices (B,) and their rows (B, D) float64; ``advance`` is called after a block was used."""
    for part in torch.split(indices, max(1, BLOCK_BYTES // (8 * max(1, rows.shape[1])))):
        yield part, rows[part].to("cpu", torch.float64)
        advance(len(part))


def _checked(sums: Tensor) -> Tensor:
    """Return sums over features unchanged; checking every feature instead would take longer than the rest.

    Raises:
        InternalError: a sum is not finite, and so some feature is not.
    """
    if not sums.isfinite().all():
        found = "a row of features holds non-finite values"
        raise InternalError("comparing features", found, "Please report this, with the command.")
    return sums


# --- principal components ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scale:
    """Means and deviations (D,) float64 of features."""

    mean: Tensor
    std: Tensor

    def __call__(self, rows: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows standardised, float32: (B, D), or the columns from ``start`` to ``stop`` of them."""
        return ((rows - self.mean[start:stop]) / self.std[start:stop]).float()


def _components(
    rows: Rows, indices: Tensor, count: int, advance: Callable[[int], None]
) -> tuple[Tensor, list[float], int]:
    """Return points (N, count) float32, the shares of variance, and how many images gave the axes."""
    result = _fitted(rows, indices)
    scale = _measured(_blocks(rows, result, advance), rows.shape[1])
    if rows.shape[1] <= len(result):
        axes, shares = _axes_of_columns(rows, result, scale, count, advance)
    else:
        axes, shares = _axes_of_rows(rows, result, scale, count, advance)
    furthest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    axes = torch.where(furthest < 0, -axes, axes).float()
    points = torch.cat([scale(block) @ axes for _, block in _blocks(rows, indices, advance)])
    return points, shares, len(result)


def _fitted(rows: Rows, indices: Tensor) -> Tensor:
    """Return the images that give the axes: all, or ``LARGEST_MATRIX`` of them."""
    if min(len(indices), rows.shape[1]) <= LARGEST_MATRIX:
        return indices
    return indices[torch.arange(LARGEST_MATRIX) * len(indices) // LARGEST_MATRIX]


def _measured(blocks: Iterator[tuple[Tensor, Tensor]], size: int) -> _Scale:
    """Return means and deviations of features.

    They are merged block by block: a sum of squares would lose features that are far from zero.
    """
    count, mean, squares = 0, torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for part, block in blocks:
        total, here = count + len(part), block.mean(dim=0)
        squares += (block - here).square().sum(dim=0) + (here - mean).square() * (count * len(part) / total)
        mean += (here - mean) * (len(part) / total)
        count = total
    std = _checked((squares / count).sqrt())
    floor = SMALLEST_STD * std.mean().item() or 1.0  # where all images are the same, all is zero
    return _Scale(mean, std.clamp_min(floor))


def _axes_of_columns(
    rows: Rows, indices: Tensor, scale: _Scale, count: int, advance: Callable[[int], None]
) -> tuple[Tensor, list[float]]:
    """Return axes (D, count) float64 and their shares, by the covariances (D, D)."""
    size = rows.shape[1]
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for _, block in _blocks(rows, indices, advance):
        numbers = scale(block)
        matrix += numbers.T @ numbers
    values, axes = _directions(matrix, count)
    return axes, _shares(values, matrix)


def _axes_of_rows(
    rows: Rows, indices: Tensor, scale: _Scale, count: int, advance: Callable[[int], None]
) -> tuple[Tensor, list[float]]:
    """Return axes (D, count) float64 and their shares, by the products of rows (N, N)."""
    matrix = torch.zeros(len(indices), len(indices), dtype=torch.float64)
    step = max(1, BLOCK_BYTES // (8 * len(indices)))
    for start in range(0, rows.shape[1], step):
        stop = min(start + step, rows.shape[1])
        numbers = scale(rows.columns(indices, start, stop).to("cpu", torch.float64), start, stop)
        matrix += numbers @ numbers.T
    values, vectors = _directions(matrix, count)
    axes = torch.zeros(rows.shape[1], count, dtype=torch.float64)
    done = 0
    for part, block in _blocks(rows, indices, advance):
        axes += scale(block).double().T @ vectors[done : done + len(part)]
        done += len(part)
    # What hardly varies has no direction: rounding alone would give it one.
    seen = values > _TOLERANCE * values.max().clamp_min(1)
    axes = torch.where(seen, axes / values.clamp_min(_TINY).sqrt(), 0.0)
    return axes, _shares(values, matrix)


def _shares(values: Tensor, matrix: Tensor) -> list[float]:
    """Return eigenvalues as shares of their sum; zeros where nothing varies."""
    total = matrix.trace().item()
    return [value / total if total > 0 else 0.0 for value in values.clamp_min(0).tolist()]


def _directions(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ``count`` largest eigenvalues and their vectors (M, count), padded with zeros.

    Large matrices use subspace iteration: all eigenvectors of 2,048 features took 18 seconds on one core, two
    take less than one.
    """
    size = len(matrix)
    if size <= 4 * (count + _EXTRA):
        values, vectors = torch.linalg.eigh(matrix)
    else:
        values, vectors = _iterated(matrix, count)
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    missing = count - len(values)
    return torch.nn.functional.pad(values, (0, missing)), torch.nn.functional.pad(vectors, (0, missing))


def _iterated(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues in ascending order, and their vectors; more than ``count`` of them.

    The number of iterations is limited: if eigenvalues are nearly equal, any vectors of their span will do.
    """
    start = torch.randn(
        len(matrix), count + _EXTRA, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    basis = torch.linalg.qr(start).Q
    for _ in range(_ITERATIONS):
        product = matrix @ basis
        values, turn = torch.linalg.eigh(basis.T @ product)
        vectors, images = basis @ turn, product @ turn
        errors = (images - vectors * values).norm(dim=0)[-count:]
        if errors.max() <= _TOLERANCE * values[-1].abs():
            break
        basis = torch.linalg.qr(product).Q
    return values, vectors
