"""Several processes that train together learn what one learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.data.loader import Batch, plan_epoch, take_share
from finetune.errors import EnvironmentFaultError, InterruptedRunError, LostProcessError
from finetune.system.distributed import SINGLE_PROCESS, Distributed
from finetune.system.rank import RankInfo
from finetune.training.ddp import find_share, synchronize_batch_norm, waits_in_forward
from finetune.training.state import Progress
from finetune.training.trainer import Trainer
from tests.conftest import draw_folder
from tests.processes import together
from tests.sweeps import slow_except
from tests.training.helpers import (
    NormFree,
    SmallNet,
    assert_same_end,
    build_trainer,
    corrupt,
    metrics_of,
    stop_after,
    warnings,
)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """57 and 9 images: with batches of 32 the last one has 25, with batches of 8 it has 1, which joins."""
    root = tmp_path_factory.mktemp("uneven")
    draw_folder(root / "train", {"red": 30, "green": 17, "blue": 10})
    draw_folder(root / "val", dict.fromkeys(("red", "green", "blue"), 3))
    return root


def place(rank: int, size: int) -> Distributed:
    return Distributed(RankInfo(rank, size, rank, size))


def net(kind: type[SmallNet] = NormFree) -> nn.Module:
    torch.manual_seed(1)
    return kind()


Ended = tuple[Mapping[str, Tensor], list[dict[str, float]], Progress, list[str], Tensor]


def train(distributed: Distributed, data: Path, folder: Path, **words: Any) -> Ended:
    """Weights, history, progress, warnings and validation logits of a training."""
    torch.manual_seed(1)
    words = {"epochs": 5, "batch_size": 32, "lr": 0.05, "network": net()} | words
    trainer = build_trainer(data, folder / str(distributed.rank), distributed=distributed, **words)
    progress = trainer.fit()
    weights = {name: tensor.clone() for name, tensor in trainer.eval_network.state_dict().items()}
    return weights, metrics_of(progress), progress, warnings(trainer), trainer.predictions.logits


def assert_close(one: Ended, two: Ended, tolerance: float = 1e-5) -> None:
    assert one[0].keys() == two[0].keys()
    for name, tensor in one[0].items():
        torch.testing.assert_close(tensor, two[0][name], atol=tolerance, rtol=tolerance, msg=name)
    torch.testing.assert_close(one[4], two[4], atol=10 * tolerance, rtol=10 * tolerance)
    for left, right in zip(one[1], two[1], strict=True):
        assert left == pytest.approx(right, abs=10 * tolerance)


# --- the shares ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("num_samples", [1, 2, 3, 15, 16, 17, 33, 100])
def test_every_image_is_learnt_from_once(num_samples: int, size: int) -> None:
    plan = plan_epoch(num_samples, 16, 0, 0)
    shares = [take_share(plan, place(rank, size), shuffled=True) for rank in range(size)]
    for number, batch in enumerate(plan):
        parts = [share[number] for share in shares]
        assert list(chain(*parts)) == batch
        if size > 1 and len(batch) > 1:
            assert all(len(part) != 1 for part in parts)  # BatchNorm
            assert max(map(len, parts)) <= max(3, -(-len(batch) // size))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("num_samples", [1, 16, 33, 100])
def test_every_image_is_judged_once(num_samples: int, size: int) -> None:
    plan = plan_epoch(num_samples, 16, None, 0)
    shares = [take_share(plan, place(rank, size), shuffled=False) for rank in range(size)]
    assert sorted(chain(*shares)) == plan  # whole batches: the same neighbours


# --- the same result -----------------------------------------------------------------------------


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "words",
    [
        {},
        {"class_weights": "balanced", "label_smoothing": 0.1},
        pytest.param({"microbatch": 5, "class_weights": "balanced"}, marks=pytest.mark.slow),
        pytest.param(
            {"batch_size": 8, "epochs": 2, "optimizer": "adamw", "lr": 0.003, "ema_decay": 0.9},
            marks=pytest.mark.slow,
        ),
        pytest.param({"clip_grad": 0.05}, marks=pytest.mark.slow),
        {"strategy": "top", "augmentation": "light"},
    ],
    ids=str,
)
def test_two_processes_learn_what_one_learns(uneven: Path, tmp_path: Path, words: dict[str, Any]) -> None:
    """Ten steps of 2 x 16 (and of other settings) are those of 1 x 32, to 1e-5."""
    one = train(SINGLE_PROCESS, uneven, tmp_path / "one", **words)
    first, second = together(lambda distributed: train(distributed, uneven, tmp_path / "two", **words))
    assert one[2].step >= 10
    assert_close(one, first)
    assert all(tensor.equal(second[0][name]) for name, tensor in first[0].items())
    assert first[1] == second[1]
    assert not (tmp_path / "two" / "1" / "history.csv").exists()  # one writer


@pytest.mark.slow
def test_three_processes_of_which_one_has_no_image_of_the_last_batch(uneven: Path, tmp_path: Path) -> None:
    words = {"batch_size": 9, "epochs": 2}  # 57 = 6 x 9 + 3
    one = train(SINGLE_PROCESS, uneven, tmp_path / "one", **words)
    assert_close(
        one, together(lambda distributed: train(distributed, uneven, tmp_path / "three", **words), 3)[0]
    )


@pytest.mark.slow
def test_batch_norm_sees_its_own_part_and_its_statistics_are_everybodys(uneven: Path, tmp_path: Path) -> None:
    def still(distributed: Distributed) -> Ended:
        words: dict[str, Any] = {"network": net(SmallNet), "lr": 1e-9, "epochs": 1}
        return train(distributed, uneven, tmp_path / str(distributed.size), **words)

    one = still(SINGLE_PROCESS)
    first, second = together(still)
    assert all(tensor.equal(second[0][name]) for name, tensor in first[0].items())
    mean, variance = "stage1.1.running_mean", "stage1.1.running_var"
    torch.testing.assert_close(first[0][mean], one[0][mean], atol=1e-5, rtol=1e-5)
    assert not torch.equal(first[0][variance], one[0][variance])  # of parts: docs/processes.md says so


@pytest.mark.slow
def test_dropout_draws_another_mask_in_each_process(uneven: Path, tmp_path: Path) -> None:
    def work(distributed: Distributed) -> list[float]:
        trainer = build_trainer(
            uneven, tmp_path / str(distributed.rank), distributed=distributed, dropout=0.5, batch_size=32
        )
        seen: list[float] = []
        drop = trainer.task.network.get_submodule("stage1.3")

        def note(_: nn.Module, images: tuple[Tensor], out: Tensor) -> None:
            seen.append((out[0, :, 0, 0] / images[0][0, :, 0, 0].add(1e-9)).round().sum().item())

        drop.register_forward_hook(note)
        stop_after(trainer, 8)
        with pytest.raises(InterruptedRunError):
            trainer.fit()
        return seen

    first, second = together(work)
    assert first != second


class _WithUnused(NormFree):
    """Has weights that no image reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.stage2[0].unused = nn.Parameter(torch.ones(2, 2))  # type: ignore[union-attr]


@pytest.mark.slow
def test_weights_that_learn_nothing_are_no_obstacle(uneven: Path, tmp_path: Path) -> None:
    one = train(SINGLE_PROCESS, uneven, tmp_path / "one", network=net(_WithUnused))
    first, _ = together(
        lambda distributed: train(distributed, uneven, tmp_path / "two", network=net(_WithUnused))
    )
    assert_close(one, first)


@pytest.mark.slow
def test_where_processes_wait_in_the_forward_nothing_is_rehearsed(
    uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SyncBatchNorm itself works on GPUs only."""
    monkeypatch.setattr("finetune.training.step.waits_in_forward", lambda _: True)
    monkeypatch.setattr("finetune.training.step.MicrobatchRunner._rehearse", None)
    one = train(SINGLE_PROCESS, uneven, tmp_path / "one")
    assert_close(one, together(lambda distributed: train(distributed, uneven, tmp_path / "two"))[0])


def test_sync_batch_norm_is_known_where_it_is() -> None:
    network = SmallNet()
    assert not waits_in_forward(network)
    weight = network.stage1[1].weight
    synchronize_batch_norm(network)
    assert waits_in_forward(network)
    assert network.stage1[1].weight is weight  # which the optimiser holds
    network.stage1.eval()
    assert waits_in_forward(network)
    network.stage2.eval()  # frozen stages do not communicate, so steps can be rehearsed
    assert not waits_in_forward(network)


# --- trouble in one of them ----------------------------------------------------------------------


@pytest.mark.slow
def test_lost_images_are_everybodys(uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.training.trainer.refuse_many_lost", lambda *_: None)

    def lose_one(distributed: Distributed, folder: Path) -> Ended:
        class Losing(Trainer):
            def _begin(self) -> None:
                super()._begin()
                loader: Any = self.task.train
                gone = loader.samples[3]
                opened = loader._views.dataset.file(gone)
                kept = type(loader._views).__getitem__

                def get(views: Any, key: tuple[int, int]) -> Any:
                    if views.dataset.file(views.samples[key[1]]) == opened:
                        from finetune.data.loader import _UnreadableImage

                        return _UnreadableImage(gone.path, "gone")
                    return kept(views, key)

                monkeypatch.setattr(type(loader._views), "__getitem__", get)

        return train(distributed, uneven, folder, trainer_type=Losing)

    first, second = together(lambda distributed: lose_one(distributed, tmp_path / "two"))
    one = lose_one(SINGLE_PROCESS, tmp_path / "one")
    assert_close(one, first)
    assert first[2].lost == second[2].lost == one[2].lost != {}


def test_an_image_that_is_left_alone_is_not_learnt_from(uneven: Path) -> None:
    """BatchNorm cannot train on a single value."""

    def work(distributed: Distributed) -> tuple[int, int, float]:
        number = 4 if distributed.rank == 0 else 1
        lost = {} if distributed.rank == 0 else {"a.jpg": "gone"}
        labels = torch.zeros(number, dtype=torch.int64)
        batch = Batch(torch.zeros(number, 3, 8, 8), labels, labels, lost)
        share = find_share(distributed, batch, nn.CrossEntropyLoss(), mixes=False, least=2)
        assert share.lost == {"a.jpg": "gone"}
        return len(share.batch.labels), share.num_images, share.factor

    assert together(work) == [(4, 4, 2.0), (0, 4, 0.0)]


def out_of_memory(trainer: Trainer, most: int, when: Callable[[Progress], bool] = lambda _: True) -> None:
    """Let a forward of more images than ``most`` run out of memory."""

    def check(_: nn.Module, inputs: tuple[Tensor]) -> None:
        if len(inputs[0]) > most and torch.is_grad_enabled() and when(trainer.progress):
            raise torch.OutOfMemoryError("CUDA out of memory. (a test)")

    trainer.task.network.register_forward_pre_hook(check)


def train_short_of_memory(
    distributed: Distributed,
    data: Path,
    folder: Path,
    most: int,
    when: Callable[[Progress], bool] = lambda _: True,
) -> Ended:
    class Short(Trainer):
        def _begin(self) -> None:
            super()._begin()
            if distributed.rank == distributed.size - 1:
                out_of_memory(self, most, when)

    return train(distributed, data, folder, trainer_type=Short)


@pytest.mark.slow
def test_memory_that_runs_out_in_one_halves_the_parts_of_all(uneven: Path, tmp_path: Path) -> None:
    one = train(SINGLE_PROCESS, uneven, tmp_path / "one")
    first, second = together(
        lambda distributed: train_short_of_memory(distributed, uneven, tmp_path / "two", 5)
    )
    assert first[2].microbatch == second[2].microbatch == 4
    assert len(first[3]) == 2  # 16 -> 8 -> 4
    assert_close(one, first)


@pytest.mark.slow
def test_memory_that_runs_out_beside_the_optimisers_state_halves_the_parts_of_all(
    uneven: Path, tmp_path: Path
) -> None:
    """The second step is the first one with AdamW's moments in memory; it is rehearsed too."""
    words: dict[str, Any] = {"optimizer": "adamw", "lr": 0.003}

    def work(distributed: Distributed) -> Ended:
        class Short(Trainer):
            def _begin(self) -> None:
                super()._begin()
                if distributed.rank == 1:
                    out_of_memory(self, 8, lambda _: bool(self.phase.optimizer.state))

        return train(distributed, uneven, tmp_path / "two", trainer_type=Short, **words)

    one = train(SINGLE_PROCESS, uneven, tmp_path / "one", **words)
    first, second = together(work)
    assert first[2].microbatch == second[2].microbatch == 7  # of 13
    assert [text.partition(";")[0] for text in first[3]] == ["memory ran out at step 2"]
    assert_close(one, first)


@pytest.mark.slow
def test_memory_that_runs_out_for_good_ends_all_for_the_same_reason(uneven: Path, tmp_path: Path) -> None:
    ended = together(lambda distributed: train_short_of_memory(distributed, uneven, tmp_path / "two", 0))
    assert [type(error) for error in ended] == [EnvironmentFaultError] * 2


@pytest.mark.slow
def test_memory_that_runs_out_later_is_a_process_lost(uneven: Path, tmp_path: Path) -> None:
    """The others wait for its gradient, and nothing calls them back: the job begins again, and rehearses."""

    def work(distributed: Distributed) -> Ended:
        return train_short_of_memory(
            distributed, uneven, tmp_path / "two", 5, lambda progress: progress.step == 6
        )

    assert [type(error) for error in together(work)] == [LostProcessError] * 2


@pytest.mark.slow
def test_a_loss_that_is_no_number_in_one_is_skipped_by_all(uneven: Path, tmp_path: Path) -> None:
    def at_four(progress: Progress) -> bool:
        return progress.step == 4

    one = train(SINGLE_PROCESS, uneven, tmp_path / "one", trainer_type=corrupt(at_four))

    def work(distributed: Distributed) -> Ended:
        kind = corrupt(at_four) if distributed.rank == 1 else Trainer
        return train(distributed, uneven, tmp_path / "two", trainer_type=kind)

    first, second = together(work)
    assert first[2].skipped == second[2].skipped == 1
    assert_close(one, first)


@pytest.mark.slow
@pytest.mark.parametrize("asked", slow_except([1], [0, 1]))
def test_a_stop_that_one_hears_stops_all_and_they_go_on_to_the_same_bits(
    uneven: Path, tmp_path: Path, asked: int
) -> None:
    def build(distributed: Distributed, folder: Path) -> Trainer:
        words: dict[str, Any] = {"epochs": 3, "batch_size": 16, "lr": 0.05, "dropout": 0.3}
        # Only the main process's folder is the run's; the others read it.
        return build_trainer(uneven, folder, distributed=distributed, **words)

    def stop(distributed: Distributed) -> int:
        trainer = build(distributed, tmp_path / "parts")
        if distributed.rank == asked:
            stop_after(trainer, 6)
        with pytest.raises(InterruptedRunError):
            trainer.fit()
        return trainer.progress.step

    def finish(folder: Path) -> Callable[[Distributed], int]:
        return lambda distributed: build(distributed, folder).fit().step

    assert together(stop) == [6, 6]
    assert together(finish(tmp_path / "parts")) == together(finish(tmp_path / "whole"))
    assert_same_end(tmp_path / "parts", tmp_path / "whole")
