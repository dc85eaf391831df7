"""Alike images and planes, against NumPy's brute force and scikit-learn."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from finetune.errors import EnvironmentFaultError, InternalError, UsageError
from finetune.features import retrieval as retrieve
from finetune.features.retrieval import Plane, count_reads, find_nearest, find_plane, find_umap_plane
from finetune.features.rows import FileRows, MemoryRows, Rows


def silent(_: int) -> None:
    """Nobody watches."""


def drawn(num: int, size: int, seed: int = 0) -> torch.Tensor:
    """Features in groups, with three clear directions and means far from zero."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num, 3, generator=generator) * torch.tensor([5.0, 3.0, 1.5])
    directions = torch.randn(3, size, generator=generator)
    return 20 + hidden @ directions + torch.randn(num, size, generator=generator)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows of 40 numbers."""
    monkeypatch.setattr(retrieve, "BLOCK_BYTES", 7 * 40 * 8)


def in_file(folder: Path, rows: torch.Tensor) -> FileRows:
    rows.numpy().tofile(folder / "rows")
    return FileRows(folder / "rows", (rows.shape[0], rows.shape[1]), rows.dtype)


# --- alike images ------------------------------------------------------------------------------


def by_brute_force(rows: torch.Tensor, indices: torch.Tensor, query: torch.Tensor, top: int) -> list[int]:
    many, one = rows.double().numpy(), query.double().numpy()
    cosines = many @ one / np.linalg.norm(many, axis=1) / np.linalg.norm(one)
    return sorted(indices.tolist(), key=lambda index: (-np.float32(cosines[index]), index))[:top]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("top", [1, 5, 30, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nearest_are_those_of_brute_force(tmp_path: Path, top: int, dtype: torch.dtype) -> None:
    rows = torch.randn(100, 40, generator=torch.Generator().manual_seed(3)).to(dtype)
    indices = torch.randperm(100, generator=torch.Generator().manual_seed(4))[:80]
    query = rows[indices[7]]
    expected = by_brute_force(rows, indices, query, top)
    for kind in (MemoryRows(rows), in_file(tmp_path, rows)):
        found = find_nearest(kind, indices, query, top, silent)
        assert [index for index, _ in found] == expected
        assert found[0] == (int(indices[7]), 1.0)
        for index, similarity in found:
            cosine = torch.cosine_similarity(rows[index].double(), query.double(), dim=0)
            assert similarity == pytest.approx(cosine.item(), abs=1e-6)


@pytest.mark.usefixtures("small_blocks")
def test_equal_images_come_by_their_index() -> None:
    rows = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)).repeat(60, 1)
    rows[31] *= 7  # as like as the others: the angle counts
    rows[32] = -rows[32]
    indices = torch.arange(60).flip(0)
    found = find_nearest(MemoryRows(rows), indices, rows[0], 60, silent)
    assert [index for index, _ in found] == [*range(32), *range(33, 60), 32]
    assert [similarity for _, similarity in found] == [1.0] * 59 + [-1.0]


def test_features_of_zero_are_like_nothing() -> None:
    rows = torch.tensor([[0.0, 0], [1, 0], [-1, 0], [0, 0]])
    found = find_nearest(MemoryRows(rows), torch.arange(4), rows[1], 9, silent)
    assert found == [(1, 1.0), (0, 0.0), (3, 0.0), (2, -1.0)]
    alone = find_nearest(MemoryRows(rows), torch.arange(4), rows[0], 2, silent)
    assert alone == [(0, 0.0), (1, 0.0)]


def test_large_and_small_numbers_do_not_overflow() -> None:
    rows = torch.tensor([[3e38, 3e38], [1e-40, 1e-40], [1, -1]])
    found = find_nearest(MemoryRows(rows), torch.arange(3), rows[0], 3, silent)
    assert found == [(0, 1.0), (1, 1.0), (2, 0.0)]


@pytest.mark.usefixtures("small_blocks")
def test_every_image_is_told() -> None:
    told: list[int] = []
    rows = MemoryRows(torch.rand(50, 40))
    find_nearest(rows, torch.arange(40), torch.rand(40), 3, told.append)
    assert told == [7, 7, 7, 7, 7, 5]
    told.clear()
    find_plane(rows, torch.arange(50), told.append)
    assert sum(told) == count_reads(rows, torch.arange(50))


def test_nothing_to_look_among() -> None:
    rows = MemoryRows(torch.rand(5, 4))
    assert find_nearest(rows, torch.arange(0), torch.rand(4), 3, silent) == []


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_refused(number: float) -> None:
    rows = torch.rand(20, 4)
    rows[13, 2] = number
    kind = MemoryRows(rows)
    for call in (
        lambda: find_nearest(kind, torch.arange(20), rows[0], 3, silent),
        lambda: find_nearest(kind, torch.arange(13), rows[13], 3, silent),
        lambda: find_plane(kind, torch.arange(20), silent),
    ):
        with pytest.raises(InternalError, match="non-finite"):
            call()
    assert len(find_nearest(kind, torch.arange(13), rows[0], 3, silent)) == 3


# --- planes --------------------------------------------------------------------------------------


def assert_plane(plane: Plane, rows: torch.Tensor) -> None:
    """Compare a plane with scikit-learn's, whose sides may be others."""
    standardised = StandardScaler().fit_transform(rows.double().numpy())
    oracle = PCA(n_components=2, svd_solver="full").fit(standardised)
    expected = oracle.transform(standardised)
    expected *= np.sign((expected * plane.points.numpy()).sum(axis=0))
    np.testing.assert_allclose(plane.points.numpy(), expected, atol=2e-4 * np.abs(expected).max())
    np.testing.assert_allclose(plane.shares, oracle.explained_variance_ratio_, rtol=1e-5)


SHAPES = [(300, 40), (40, 300), (60, 60), (500, 200), (200, 500), (5, 2), (12, 900)]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shape", SHAPES)
def test_the_plane_is_that_of_scikit_learn(tmp_path: Path, shape: tuple[int, int]) -> None:
    rows = drawn(*shape)
    for kind in (MemoryRows(rows), in_file(tmp_path, rows)):
        plane = find_plane(kind, torch.arange(len(rows)), silent)
        assert plane.points.dtype == torch.float32
        assert plane.num_fitted == len(rows)
        assert_plane(plane, rows)


def test_features_without_directions_are_told_apart_in_time() -> None:
    rows = torch.randn(400, 300, generator=torch.Generator().manual_seed(0))
    assert_plane(find_plane(MemoryRows(rows), torch.arange(400), silent), rows)


@pytest.mark.usefixtures("small_blocks")
def test_points_come_in_the_order_asked_for() -> None:
    rows = drawn(120, 40)
    indices = torch.randperm(120, generator=torch.Generator().manual_seed(1))[:90]
    assert_plane(find_plane(MemoryRows(rows), indices, silent), rows[indices])


@pytest.mark.parametrize("shape", [(300, 40), (40, 300)])
def test_sides_do_not_depend_on_chance(shape: tuple[int, int]) -> None:
    rows = drawn(*shape)
    one = find_plane(MemoryRows(rows), torch.arange(len(rows)), silent)
    two = find_plane(MemoryRows(rows), torch.arange(len(rows)), silent)
    assert torch.equal(one.points, two.points)
    turned = torch.randperm(len(rows), generator=torch.Generator().manual_seed(2))
    three = find_plane(MemoryRows(rows), turned, silent)
    assert torch.allclose(one.points[turned], three.points, atol=1e-3)


@pytest.mark.parametrize("size", [30, 300])
def test_silent_features_are_not_amplified(size: int) -> None:
    rows = drawn(200, size)
    rows[:, 0], rows[:, 1] = 7.0, 7.0
    rows[3, 1] = 7.0001
    plane = find_plane(MemoryRows(rows), torch.arange(200), silent)
    others = find_plane(MemoryRows(rows[:, 2:].contiguous()), torch.arange(200), silent)
    assert plane.points.isfinite().all()
    signs = (plane.points * others.points).sum(dim=0).sign()
    assert torch.allclose(plane.points, signs * others.points, atol=0.01)


@pytest.mark.parametrize("rows", [torch.ones(8, 20), torch.ones(30, 4), torch.ones(1, 4), torch.zeros(2, 1)])
def test_images_that_are_all_the_same(rows: torch.Tensor) -> None:
    plane = find_plane(MemoryRows(rows), torch.arange(len(rows)), silent)
    assert torch.equal(plane.points, torch.zeros(len(rows), 2))
    assert plane.shares == (0.0, 0.0)


@pytest.mark.parametrize("size", [1, 50])
def test_images_on_a_line(size: int) -> None:
    rows = torch.linspace(0, 1, 20)[:, None] * torch.linspace(1, 2, size)
    plane = find_plane(MemoryRows(rows), torch.arange(20), silent)
    assert plane.shares == pytest.approx((1.0, 0.0), abs=1e-6)
    assert plane.points[:, 1].abs().max() < 1e-3
    assert (plane.points[:, 0].diff().sign() == plane.points[1, 0].sub(plane.points[0, 0]).sign()).all()


def test_too_many_for_one_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Axes come from some images, evenly spaced, and all are laid on them."""
    rows = drawn(600, 90)
    whole = find_plane(MemoryRows(rows), torch.arange(600), silent)
    monkeypatch.setattr(retrieve, "LARGEST_MATRIX", 80)
    told: list[int] = []
    plane = find_plane(MemoryRows(rows), torch.arange(600), told.append)
    assert plane.num_fitted == 80
    assert sum(told) == count_reads(MemoryRows(rows), torch.arange(600)) == 760
    for axis in range(2):
        pair = torch.stack([whole.points[:, axis], plane.points[:, axis]])
        assert pair.corrcoef()[0, 1].abs() > 0.99


class CountedRows(MemoryRows):
    """Rows that know how many of their numbers were asked for at a time."""

    most = 0

    def __getitem__(self, indices: torch.Tensor) -> torch.Tensor:
        return self.columns(indices, 0, self.shape[1])

    def columns(self, indices: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        self.most = max(self.most, len(indices) * (stop - start))
        return super().columns(indices, start, stop)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shape", [(400, 40), (40, 400)])
def test_no_more_than_a_block_is_read(shape: tuple[int, int]) -> None:
    rows = CountedRows(drawn(*shape))
    find_plane(rows, torch.arange(shape[0]), silent)
    find_nearest(rows, torch.arange(shape[0]), rows.tensor[0], 3, silent)
    assert 0 < rows.most <= max(7 * 40, *shape)


# --- UMAP ----------------------------------------------------------------------------------------


class FakeUmap:
    """Notes what it was given, and gives the first two columns."""

    given: np.ndarray[Any, Any]

    def __init__(self, **words: Any) -> None:
        assert words["n_components"] == 2 and words["random_state"] == 0

    def fit_transform(self, numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        FakeUmap.given = numbers
        return numbers[:, :2]


@pytest.mark.parametrize(("size", "given"), [(200, 50), (30, 50)])
def test_umap_is_given_principal_components(monkeypatch: pytest.MonkeyPatch, size: int, given: int) -> None:
    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=FakeUmap))
    rows: Rows = MemoryRows(drawn(120, size))
    plane = find_umap_plane(rows, torch.arange(120), silent)
    assert FakeUmap.given.shape == (120, given)
    assert plane.shares is None
    assert torch.allclose(plane.points, find_plane(rows, torch.arange(120), silent).points, atol=1e-2)


def test_umap_of_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=FakeUmap))
    with pytest.raises(UsageError, match="needs 16 images, and there are 15"):
        find_umap_plane(MemoryRows(torch.rand(20, 4)), torch.arange(15), silent)


def test_umap_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(EnvironmentFaultError, match=r"pip install umap-learn"):
        find_umap_plane(MemoryRows(torch.rand(20, 4)), torch.arange(20), silent)


def test_umap_itself() -> None:
    pytest.importorskip("umap")
    rows = torch.cat([torch.randn(40, 60), torch.randn(40, 60) + 4])
    one = find_umap_plane(MemoryRows(rows), torch.arange(80), silent)
    two = find_umap_plane(MemoryRows(rows), torch.arange(80), silent)
    assert torch.equal(one.points, two.points)
    middles = one.points[:40].mean(dim=0), one.points[40:].mean(dim=0)
    spread = one.points[:40].std(dim=0).norm()
    assert (middles[0] - middles[1]).norm() > 2 * spread
