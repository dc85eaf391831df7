"""Content is a function of (seed, epoch, index): not of workers, not of what was loaded before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finetune.data.discover import discover
from finetune.data.loader import Batch, Loader, Placement, plan_epoch
from finetune.data.transforms import build_train_transform
from finetune.errors import DataError
from pretrained.catalog import Preprocessing
from tests.conftest import draw_folder


def build_loader(
    root: Path, workers: int = 0, seed: int = 0, shuffle: bool = True, batch_size: int = 5
) -> Loader:
    dataset = discover(root, 0.2, 0)
    return Loader(
        dataset,
        dataset.of("train"),
        build_train_transform(Preprocessing(img_size=16), "heavy"),
        batch_size=batch_size,
        placement=Placement(torch.device("cpu"), channels_last=True),
        workers=workers,
        seed=seed,
        shuffle=shuffle,
    )


def assert_same(one: list[Batch], two: list[Batch]) -> None:
    assert len(one) == len(two)
    for left, right in zip(one, two, strict=True):
        assert all(a.equal(b) for a, b in zip(left[:3], right[:3], strict=True))
        assert left.lost == right.lost


def test_workers_and_history_leave_no_trace(pictures: Path) -> None:
    here, there = build_loader(pictures, workers=0), build_loader(pictures, workers=2)
    list(here.batches(epoch=0))  # draws from every generator
    torch.rand(3)
    assert_same(list(here.batches(epoch=3)), list(there.batches(epoch=3)))


def test_an_epoch_can_begin_anywhere(pictures: Path) -> None:
    loader = build_loader(pictures)
    assert_same(list(loader.batches(epoch=2))[4:], list(loader.batches(epoch=2, start=4)))
    assert_same(list(loader.batches(epoch=2))[:2], list(loader.batches(epoch=2, stop=2)))


def test_epochs_and_seeds_differ_in_order_and_views(pictures: Path) -> None:
    loader = build_loader(pictures, batch_size=36)
    (first,), (second,) = loader.batches(0), loader.batches(1)
    assert not first.indices.equal(second.indices)
    view = {int(index): image for index, image in zip(first.indices, first.images, strict=True)}
    again = {int(index): image for index, image in zip(second.indices, second.images, strict=True)}
    assert sum(view[index].equal(again[index]) for index in view) < 3
    (other,) = build_loader(pictures, seed=1, batch_size=36).batches(0)
    assert not other.indices.equal(first.indices)


def test_batches_are_normalised_and_in_the_asked_layout(pictures: Path) -> None:
    batch = next(build_loader(pictures).batches())
    assert batch.images.shape == (5, 3, 16, 16)
    assert batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.images.min() < 0 < batch.images.max()


@pytest.mark.parametrize(
    ("count", "size", "sizes"), [(10, 4, [4, 4, 2]), (9, 4, [4, 5]), (1, 4, [1]), (8, 4, [4, 4])]
)
def test_a_last_batch_of_one_joins_the_one_before(count: int, size: int, sizes: list[int]) -> None:
    batches = plan_epoch(count, size, seed=0, epoch=0)
    assert [len(batch) for batch in batches] == sizes
    assert sorted(index for batch in batches for index in batch) == list(range(count))


def test_evaluation_keeps_order_and_size() -> None:
    assert plan_epoch(9, 4, seed=None, epoch=5) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_picture_lost_on_the_way_is_named(tmp_path: Path, workers: int, shuffle: bool) -> None:
    """Training may go on without it; a figure over fewer pictures is refused."""
    draw_folder(tmp_path / "data", {"blue": 4, "red": 4})
    loader = build_loader(tmp_path / "data", workers=workers, shuffle=shuffle)
    lost = loader.samples[2].path
    (tmp_path / "data" / lost).unlink()
    if not shuffle:
        with pytest.raises(DataError, match=lost):
            list(loader.batches())
        return
    batches = list(loader.batches())
    assert [batch.lost for batch in batches if batch.lost] == [{lost: "file not found"}]
    kept = torch.cat([batch.indices for batch in batches]).tolist()
    assert sorted(kept) == [index for index in range(len(loader.samples)) if index != 2]


def test_waiting_is_measured(pictures: Path) -> None:
    loader = build_loader(pictures)
    list(loader.batches())
    assert loader.wait_seconds > 0
