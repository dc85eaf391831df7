"""Training in phases: each freezes anew, is watched on its own, and several processes change it together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from finetune.errors import InternalError
from finetune.system.distributed import SINGLE_PROCESS, Distributed
from finetune.training.trainer import Trainer
from tests.processes import together
from tests.strategies.gradual import gradual_unfreezing
from tests.training.helpers import NormFree, assert_same_end, build_trainer, corrupt, warnings


@pytest.fixture(autouse=True)
def gradual() -> Iterator[None]:
    with gradual_unfreezing():
        yield


def test_a_stage_that_moves_before_its_phase_is_found(image_folder: Path, tmp_path: Path) -> None:
    """The run as a whole trains it, so that only its phase can tell."""

    class Moves(Trainer):
        def _update(self) -> None:
            super()._update()
            if self.progress.step == 2:
                self.task.network.get_buffer("stage2.1.running_var")[0] += 1e-6

    trainer = build_trainer(
        image_folder, tmp_path, strategy="gradual", epochs=4, batch_size=8, trainer_type=Moves
    )
    with pytest.raises(InternalError, match=r"stage2\.1\.running_var"):
        trainer.fit()
    assert trainer.progress.epoch == 2


def test_the_schedule_spans_the_phases_and_momentum_begins_anew(image_folder: Path, tmp_path: Path) -> None:
    state: list[tuple[int, int, float]] = []

    class Watched(Trainer):
        def _set_lr(self) -> None:
            super()._set_lr()
            optimizer = self.phase.optimizer
            state.append((len(optimizer.param_groups), len(optimizer.state), self.progress.lr))

    build_trainer(
        image_folder, tmp_path, strategy="gradual", epochs=4, batch_size=8, lr=0.1, trainer_type=Watched
    ).fit()
    groups, moved, rates = zip(*state, strict=True)
    assert list(groups) == [2] * 10 + [4] * 10  # weights and biases of the head, then of stage2 as well
    assert moved[0] == moved[10] == 0 < moved[9] < moved[19]
    assert list(rates) == sorted(rates, reverse=True)
    assert rates[0] == 0.1


def test_going_back_stays_in_the_phase(image_folder: Path, tmp_path: Path) -> None:
    """Losses that are not finite at the start of the second phase: back to its start, and to the same end."""
    often = corrupt(lambda progress: progress.step in range(11, 15) and progress.rollbacks == 0)
    trainer = build_trainer(
        image_folder, tmp_path, strategy="gradual", epochs=4, batch_size=8, lr=0.1, trainer_type=often
    )
    progress = trainer.fit()
    assert progress.rollbacks == 1
    assert "returns to the start of epoch 3" in warnings(trainer)[-1]
    assert {row.stage.name for row in trainer.phase.plan.trained} == {"stage2", "head"}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["gradual"])
def test_two_processes_change_the_phase_together(image_folder: Path, tmp_path: Path, strategy: str) -> None:
    def train(distributed: Distributed) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        trainer = build_trainer(
            image_folder,
            tmp_path / f"{distributed.size}-{distributed.rank}",
            strategy=strategy,
            epochs=4,
            batch_size=12,
            lr=0.1,
            network=NormFree(),
            distributed=distributed,
        )
        trainer.fit()
        return {name: tensor.clone() for name, tensor in trainer.eval_network.state_dict().items()}

    alone = train(SINGLE_PROCESS)
    first, second = together(train)
    for name, tensor in alone.items():
        assert first[name].equal(second[name]), name
        torch.testing.assert_close(tensor, first[name], atol=1e-5, rtol=1e-5, msg=name)


def test_a_kill_in_the_second_phase_leaves_no_trace(image_folder: Path, tmp_path: Path) -> None:
    """The checkpoint before the one of the kill, which is of the first phase, leads to the same end too."""
    words = {"strategy": "gradual", "epochs": 4, "batch_size": 8, "lr": 0.1, "ema_decay": 0.9}

    class Saves(Trainer):
        def _train_step(self, *arguments: object) -> bool:
            made = super()._train_step(*arguments)  # type: ignore[arg-type]
            if self.progress.step in (8, 13):
                self._save()
            if self.progress.step == 14:
                raise KeyboardInterrupt
            return made

    build_trainer(image_folder, tmp_path / "whole", **words).fit()
    for damaged in (False, True):
        parts = tmp_path / f"parts-{damaged}"
        with pytest.raises(KeyboardInterrupt):
            build_trainer(image_folder, parts, trainer_type=Saves, **words).fit()
        if damaged:
            newest = sorted((parts / "checkpoints").iterdir())[-1]
            (newest / "state.safetensors").write_bytes(b"")
        trainer = build_trainer(image_folder, parts, **words)
        trainer.fit()
        assert_same_end(tmp_path / "whole", parts)
