"""A batch depends on (seed, epoch, index) alone, not on workers or on earlier batches."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.data import loader as loader_module
from finetune.data.discover import discover
from finetune.data.loader import Batch, ImageLoader, Placement, plan_epoch
from finetune.data.split import SplitConfig
from finetune.data.transforms import build_train_transform
from finetune.data.workers import choose_workers
from finetune.errors import DataError
from finetune.system.device import BATCHES_PER_WORKER
from pretrained.preprocessing import Preprocessing
from tests.conftest import draw_folder


def build_loader(
    root: Path,
    workers: int = 0,
    seed: int = 0,
    shuffle: bool = True,
    batch_size: int = 5,
    max_workers: int = 0,
    persistent: bool = True,
) -> ImageLoader:
    dataset = discover(root, SplitConfig(0.2, 0))
    return ImageLoader(
        dataset,
        dataset.of("train"),
        build_train_transform(Preprocessing(img_size=16), "heavy"),
        batch_size=batch_size,
        placement=Placement(torch.device("cpu"), channels_last=True),
        workers=workers,
        seed=seed,
        shuffle=shuffle,
        max_workers=max_workers,
        persistent=persistent,
    )


def assert_same(one: list[Batch], two: list[Batch]) -> None:
    assert len(one) == len(two)
    for left, right in zip(one, two, strict=True):
        assert all(a.equal(b) for a, b in zip(left[:3], right[:3], strict=True))
        assert left.lost == right.lost


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_and_history_do_not_change_a_batch(image_folder: Path, workers: int) -> None:
    here, there = build_loader(image_folder, workers=0), build_loader(image_folder, workers=workers)
    list(here.batches(epoch=0))  # draws from every generator
    torch.rand(3)
    assert_same(list(here.batches(epoch=3)), list(there.batches(epoch=3)))
    there.close()


def test_an_epoch_can_start_at_any_batch(image_folder: Path) -> None:
    loader = build_loader(image_folder)
    assert_same(list(loader.batches(epoch=2))[4:], list(loader.batches(epoch=2, start=4)))
    assert_same(list(loader.batches(epoch=2))[:2], list(loader.batches(epoch=2, stop=2)))


def test_epochs_and_seeds_differ_in_order_and_views(image_folder: Path) -> None:
    loader = build_loader(image_folder, batch_size=36)
    (first,), (second,) = loader.batches(0), loader.batches(1)
    assert not first.indices.equal(second.indices)
    view = {int(index): image for index, image in zip(first.indices, first.images, strict=True)}
    again = {int(index): image for index, image in zip(second.indices, second.images, strict=True)}
    assert sum(view[index].equal(again[index]) for index in view) < 3
    (other,) = build_loader(image_folder, seed=1, batch_size=36).batches(0)
    assert not other.indices.equal(first.indices)


def test_batches_are_normalised_and_in_the_requested_layout(image_folder: Path) -> None:
    batch = next(build_loader(image_folder).batches())
    assert batch.images.shape == (5, 3, 16, 16)
    assert batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.images.min() < 0 < batch.images.max()


@pytest.mark.parametrize(
    ("count", "size", "sizes"), [(10, 4, [4, 4, 2]), (9, 4, [4, 5]), (1, 4, [1]), (8, 4, [4, 4])]
)
def test_a_last_batch_of_one_is_merged_into_the_one_before(count: int, size: int, sizes: list[int]) -> None:
    batches = plan_epoch(count, size, seed=0, epoch=0)
    assert [len(batch) for batch in batches] == sizes
    assert sorted(index for batch in batches for index in batch) == list(range(count))


def test_evaluation_keeps_order_and_size() -> None:
    assert plan_epoch(9, 4, seed=None, epoch=5) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_image_lost_during_a_run_is_named(tmp_path: Path, workers: int, shuffle: bool) -> None:
    """Training may continue without it; evaluation on fewer images is refused."""
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


def test_waiting_is_measured(image_folder: Path) -> None:
    loader = build_loader(image_folder)
    list(loader.batches())
    assert loader.wait_seconds > 0


# --- Number of processes ---


@pytest.mark.parametrize(
    ("workers", "most", "waited", "chosen"),
    [
        (2, 8, 1.0, 2),  # a tenth is fine
        (2, 8, 1.1, 3),
        (4, 8, 2.5, 6),  # four made in 10 s what training takes in 7.5 s
        (2, 8, 5.0, 4),
        (2, 8, 9.9, 4),  # no more than twice as many at a time
        (6, 8, 5.0, 8),
        (8, 8, 9.0, 8),
        (2, 0, 9.0, 2),  # the user has named the number
        (0, 8, 9.0, 0),
    ],
)
def test_waiting_for_data_gives_more_processes(workers: int, most: int, waited: float, chosen: int) -> None:
    assert choose_workers(workers, most, waited, seconds=10.0) == chosen


class Clock:
    """A clock that only the test advances."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def pass_over(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ImageLoader]:
    """Make a pass with the given seconds of waiting and of training per batch."""
    clock, fetch = Clock(), loader_module.fetch
    monkeypatch.setattr(loader_module, "time", clock)

    def make_pass(
        loader: ImageLoader,
        first: float,
        waiting: float,
        training: float,
        seen: list[tuple[int, Batch]] | None = None,
    ) -> ImageLoader:
        waits = iter([first])

        def slow(*arguments: Any) -> Any:
            batch = fetch(*arguments)
            clock.now += next(waits, waiting) if batch is not None else 0.0
            return batch

        monkeypatch.setattr(loader_module, "fetch", slow)
        for batch in loader.batches():
            clock.now += training
            if seen is not None:
                seen.append((loader.workers, batch))
        return loader

    return make_pass


def test_a_loader_that_training_waited_for_gets_more_processes(
    image_folder: Path, pass_over: Callable[..., ImageLoader]
) -> None:
    loader = build_loader(image_folder, workers=1, max_workers=2)
    plain = list(build_loader(image_folder).batches(epoch=1))
    assert pass_over(loader, first=50.0, waiting=0.1, training=1.0).workers == 1  # they had to start
    assert loader.wait_seconds == pytest.approx(50.6)
    assert pass_over(loader, first=0.0, waiting=1.0, training=1.0).workers == 2
    assert pass_over(loader, first=0.0, waiting=9.0, training=1.0).workers == 2
    assert_same(list(loader.batches(epoch=1)), plain)
    assert loader._loader.num_workers == 2
    loader.close()


@pytest.mark.sample(1)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than this machine has cores
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_long_pass_gets_more_processes_before_its_end(
    image_folder: Path, pass_over: Callable[..., ImageLoader], shuffle: bool
) -> None:
    """Features are computed in a single pass: it must not be as slow to the end as it began."""
    loader = build_loader(image_folder, batch_size=2, workers=1, shuffle=shuffle, max_workers=8)
    plain = list(build_loader(image_folder, batch_size=2, shuffle=shuffle).batches())
    seen: list[tuple[int, Batch]] = []
    pass_over(loader, first=50.0, waiting=9.0, training=1.0, seen=seen)
    assert [number for number, _ in seen] == 5 * [1] + 9 * [2] + 4 * [4]
    assert_same([batch for _, batch in seen], plain)
    loader.close()


def test_a_long_pass_keeps_the_processes_that_suffice(
    image_folder: Path, pass_over: Callable[..., ImageLoader], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = build_loader(image_folder, batch_size=2, workers=1, shuffle=False, max_workers=8)
    monkeypatch.setattr(loader, "_build", lambda: pytest.fail("what was prepared is thrown away"))
    assert pass_over(loader, first=50.0, waiting=0.1, training=1.0).workers == 1
    loader.close()


def test_the_number_stays_where_the_user_has_named_it(
    image_folder: Path, pass_over: Callable[..., ImageLoader]
) -> None:
    loader = build_loader(image_folder, workers=1, max_workers=0)
    assert pass_over(loader, first=0.0, waiting=9.0, training=1.0).workers == 1
    loader.close()


@pytest.mark.parametrize("persistent", [True, False])
def test_processes_wait_for_the_next_pass_or_end(image_folder: Path, persistent: bool) -> None:
    loader = build_loader(image_folder, workers=1, shuffle=False, persistent=persistent)
    plain = list(build_loader(image_folder, shuffle=False).batches())
    before = set(active_children())
    passes = []
    for _ in range(2):
        assert_same(list(loader.batches()), plain)
        passes.append({process.pid for process in set(active_children()) - before})
    assert passes[0] == passes[1]
    assert len(passes[0]) == persistent
    loader.close()
    assert set(active_children()) == before


def test_shared_memory_holds_no_more_batches_than_planned(image_folder: Path) -> None:
    """Per process: two batches that wait, and the one that is being made."""
    assert build_loader(image_folder, workers=2)._loader.prefetch_factor == BATCHES_PER_WORKER - 1
    assert build_loader(image_folder)._loader.prefetch_factor is None


@pytest.mark.parametrize("workers", [0, 1])
def test_bytes_are_sent_and_floats_arrive(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    fetched = []
    fetch = loader_module.fetch

    def recorded(*arguments: Any) -> Any:
        batch = fetch(*arguments)
        fetched.append(batch)
        return batch

    monkeypatch.setattr(loader_module, "fetch", recorded)
    loader = build_loader(image_folder, workers=workers)
    (batch, *_) = loader.batches(stop=1)
    assert fetched[0].images.dtype == torch.uint8 and batch.images.dtype == torch.float32
    assert fetched[0].images.is_shared() == (workers > 0)
    mean, std = (
        torch.tensor(values).view(-1, 1, 1) for values in (Preprocessing().mean, Preprocessing().std)
    )
    assert batch.images.equal(fetched[0].images.float().div(255).sub(mean).div(std))
    loader.close()
