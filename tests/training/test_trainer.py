"""The loop: resume equals no interruption, frozen means frozen, and a loss that is no number stops it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.errors import DivergedError, ExitCode, InternalError, InterruptedRunError
from finetune.evaluation.predictions import Predictions
from finetune.training.freeze import check_frozen, digest_frozen
from finetune.training.trainer import Trainer
from tests.sweeps import slow_except
from tests.training.helpers import SmallNet, assert_same_end, build_trainer, metrics_of, saved, stop_after

EVERYTHING_ON: dict[str, Any] = {
    "epochs": 4,
    "batch_size": 7,
    "lr": 0.05,
    "augmentation": "heavy",
    "dropout": 0.2,
    "mixup": 0.3,
    "cutmix": 1.0,
    "ema_decay": 0.9,
    "warmup_epochs": 0.5,
    "label_smoothing": 0.1,
    "class_weights": "balanced",
    "clip_grad": 1.0,
}


def assert_same_state(one: nn.Module, two: nn.Module) -> None:
    left, right = one.state_dict(), two.state_dict()
    different = [name for name in left if not left[name].equal(right[name])]
    assert not different


@pytest.mark.sample(1)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "steps", slow_except([5, 13], [1, 5, 13, 18])
)  # 5 steps an epoch: inside the first, at its end, later
def test_an_interrupted_run_ends_in_the_same_bits(
    image_folder: Path, tmp_path: Path, steps: int, optimizer: str
) -> None:
    settings = EVERYTHING_ON | {"optimizer": optimizer}
    whole = build_trainer(image_folder, tmp_path / "whole", **settings)
    whole.standardize_head()
    whole.fit()

    first = build_trainer(image_folder, tmp_path / "parts", **settings)
    first.standardize_head()
    stop_after(first, steps)
    with pytest.raises(InterruptedRunError) as stopped:
        first.fit()
    assert stopped.value.exit_code == ExitCode.INTERRUPTED
    second = build_trainer(image_folder, tmp_path / "parts", **settings)
    second.standardize_head()
    second.fit()

    assert second.progress.step == whole.progress.step == 20
    assert_same_state(whole.task.network, second.task.network)
    assert_same_state(whole.eval_network, second.eval_network)
    assert metrics_of(whole.progress) == metrics_of(second.progress)


class StopsWhileJudging(Trainer):
    """Is asked to stop in the middle of the second validation."""

    def _validate(self) -> Predictions:
        if self.progress.epoch == 1:
            self.stop_asked = lambda: True
        return super()._validate()


def test_an_interruption_in_the_middle_of_a_validation(image_folder: Path, tmp_path: Path) -> None:
    build_trainer(image_folder, tmp_path / "whole", **EVERYTHING_ON).fit()
    first = build_trainer(image_folder, tmp_path / "parts", trainer_type=StopsWhileJudging, **EVERYTHING_ON)
    with pytest.raises(InterruptedRunError):
        first.fit()
    at = saved(tmp_path / "parts").now.progress
    assert (at.epoch, at.batch, at.step) == (1, 5, 10)
    build_trainer(image_folder, tmp_path / "parts", **EVERYTHING_ON).fit()
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_the_outcome_of_a_run_that_only_went_on_knows_its_step(image_folder: Path, tmp_path: Path) -> None:
    build_trainer(image_folder, tmp_path, epochs=2, batch_size=8).fit()
    again = build_trainer(image_folder, tmp_path, epochs=2, batch_size=8)
    again.fit()
    assert again.display.heartbeat.step == 10


def test_plateau_and_patience_survive_an_interruption(image_folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "epochs": 12,
        "batch_size": 12,
        "lr": 1e-6,  # nothing improves, so the plateau falls and patience ends
        "schedule": "plateau",
        "decay_epochs": 2,
        "patience": 5,
        "monitor": "accuracy",
    }
    whole = build_trainer(image_folder, tmp_path / "whole", **settings)
    whole.fit()
    assert whole.progress.epoch < 12
    assert whole.progress.plateau_factor < 1
    parts = build_trainer(image_folder, tmp_path / "parts", **settings)
    stop_after(parts, 10)
    with pytest.raises(InterruptedRunError):
        parts.fit()
    parts = build_trainer(image_folder, tmp_path / "parts", **settings)
    parts.fit()
    assert metrics_of(parts.progress) == metrics_of(whole.progress)


@pytest.mark.parametrize("strategy", ["freeze", "top"])
def test_frozen_stages_keep_every_bit(image_folder: Path, tmp_path: Path, strategy: str) -> None:
    trainer = build_trainer(
        image_folder,
        tmp_path,
        strategy=strategy,
        epochs=2,
        batch_size=8,
        lr=0.5,
        weight_decay=0.1,
        ema_decay=0.5,
    )
    network, plan = trainer.task.network, trainer.task.plan
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    digests = digest_frozen(network, plan)
    trainer.fit()
    check_frozen(trainer.eval_network, plan, digests)
    check_frozen(network, plan, digests)
    frozen = {"freeze": ("stage1", "stage2"), "top": ("stage1",)}[strategy]
    for name, tensor in network.state_dict().items():
        assert tensor.equal(before[name]) == name.startswith(frozen), name
    assert any(name.endswith("running_mean") for name in digests)


def test_a_frozen_tensor_that_moved_is_found(image_folder: Path, tmp_path: Path) -> None:
    trainer = build_trainer(image_folder, tmp_path, strategy="freeze", epochs=1)
    network, plan = trainer.task.network, trainer.task.plan
    digests = digest_frozen(network, plan)
    network.get_buffer("stage1.1.running_var")[0] += 1e-6
    with pytest.raises(InternalError, match=r"stage1\.1\.running_var"):
        check_frozen(network, plan, digests)


def test_the_best_epoch_is_what_is_judged(image_folder: Path, tmp_path: Path) -> None:
    trainer = build_trainer(
        image_folder, tmp_path, epochs=4, batch_size=8, lr=0.3, schedule="constant", monitor="loss"
    )
    progress = trainer.fit()
    losses = [row["eval_loss"] for row in progress.history]
    assert progress.best_epoch == losses.index(min(losses))
    assert trainer._validate().loss == pytest.approx(min(losses), abs=1e-9)


def test_patience_stops_early(image_folder: Path, tmp_path: Path) -> None:
    trainer = build_trainer(image_folder, tmp_path, epochs=50, batch_size=36, lr=1e-9, patience=3)
    progress = trainer.fit()
    assert progress.epoch - progress.best_epoch - 1 == 3


def test_norm_eval_keeps_statistics_and_trains_the_rest(image_folder: Path, tmp_path: Path) -> None:
    trainer = build_trainer(
        image_folder, tmp_path, strategy="full", norm="eval", epochs=1, batch_size=8, lr=0.5
    )
    before = {name: tensor.clone() for name, tensor in trainer.task.network.state_dict().items()}
    trainer.fit()
    for name, tensor in trainer.task.network.state_dict().items():
        assert tensor.equal(before[name]) == ("running" in name or "num_batches" in name), name


def test_a_finished_run_leaves_its_last_state(image_folder: Path, tmp_path: Path) -> None:
    trainer = build_trainer(image_folder, tmp_path, epochs=1, batch_size=8)
    trainer.fit()
    progress = saved(tmp_path).now.progress
    assert (progress.epoch, progress.batch, progress.step) == (1, 0, 5)


def test_frozen_tensors_are_not_written(image_folder: Path, tmp_path: Path) -> None:
    trainer = build_trainer(image_folder, tmp_path, strategy="top", epochs=1, batch_size=8, ema_decay=0.5)
    trainer.fit()
    names = {name.partition(".")[2].partition(":")[0] for name in saved(tmp_path).now.tensors}
    assert any(name.startswith("stage2") for name in names)
    assert not any(name.startswith("stage1") for name in names)


def test_cpu_half_precision_trains(image_folder: Path, tmp_path: Path) -> None:
    trainer = build_trainer(image_folder, tmp_path, epochs=1, batch_size=8)
    trainer.precision = trainer.gradient.precision = "bfloat16"
    assert trainer.fit().history[0]["train_loss"] > 0


def test_a_shared_tensor_survives_the_checkpoint(image_folder: Path, tmp_path: Path) -> None:
    class Tied(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.alias = self.stage2[0]

    torch.manual_seed(3)
    trainer = build_trainer(image_folder, tmp_path, network=Tied(), epochs=1, batch_size=8, lr=0.1)
    trainer.fit()
    other = build_trainer(image_folder, tmp_path, network=Tied(), epochs=1, batch_size=8, lr=0.1)
    other.fit()
    assert_same_state(trainer.eval_network, other.eval_network)


class Brittle(SmallNet):
    """Sound while it trains; in eval mode its outputs are NaN from the second epoch on."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, images: Tensor) -> Tensor:
        self.passes += not self.training
        return super().forward(images) * (float("nan") if self.passes > 3 and not self.training else 1.0)


@pytest.mark.parametrize("monitor", ["accuracy", "loss"])
def test_a_validation_loss_that_is_no_number_stops_the_run(
    image_folder: Path, tmp_path: Path, monitor: str
) -> None:
    """18 validation images in batches of 8 are 3 passes, so the loss of the second epoch is NaN."""
    trainer = build_trainer(
        image_folder, tmp_path, network=Brittle(), epochs=5, batch_size=8, monitor=monitor
    )
    with pytest.raises(DivergedError, match="validation loss became nan after epoch 2"):
        trainer.fit()
    assert trainer.progress.rollbacks == 2
    assert trainer.progress.rate_factor == 0.25
    assert all(parameter.isfinite().all() for parameter in trainer.task.network.parameters())


def test_metrics_are_those_of_the_best_epoch(image_folder: Path, tmp_path: Path) -> None:
    keys = {"epochs": 5, "lr": 2.0, "schedule": "constant"}
    whole = build_trainer(image_folder, tmp_path / "whole", **keys)
    best = whole.fit().best_epoch
    assert best < 4
    stopped = build_trainer(image_folder, tmp_path / "again", **keys)
    stopped.stop_asked = lambda: stopped.progress.epoch > best
    with pytest.raises(InterruptedRunError):
        stopped.fit()
    again = build_trainer(image_folder, tmp_path / "again", **keys)
    again.fit()
    assert again.predictions.logits.equal(whole.predictions.logits)
    assert whole.predictions.loss == whole.progress.best["loss"]
