"""Promise R6: a loss or a gradient that is no finite number never reaches the weights.

Up to three steps in a row are left out, then training goes back to the start of the epoch with half the
rate, twice at most, and then it ends, with what it met kept for a replay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from finetune.data.loader import Batch
from finetune.errors import DivergedError, ExitCode
from finetune.evaluation.predictions import Predictions
from finetune.training.checkpoint import CheckpointInterval
from finetune.training.recovery import roll_back
from finetune.training.state import Progress
from finetune.training.trainer import Trainer
from tests.sweeps import slow_except
from tests.training.helpers import (
    NormFree,
    SmallNet,
    assert_same_end,
    assert_same_tensors,
    build_trainer,
    corrupt,
    fit_until,
    metrics_of,
    saved,
    warnings,
)

EVERYTHING_ON: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 8,  # 36 images are 5 steps an epoch
    "lr": 0.05,
    "augmentation": "light",
    "dropout": 0.2,
    "mixup": 0.3,
    "ema_decay": 0.9,
    "warmup_epochs": 0.5,
    "label_smoothing": 0.1,
    "clip_grad": 1.0,
}
COUNTERS = ("skipped", "skipped_in_row", "rollbacks", "rate_factor")
When = Callable[[Progress], bool]


def leave_out(when: When) -> type[Trainer]:
    """A trainer that does not make some steps: what a step that was skipped must be equal to."""

    class LeavesOut(Trainer):
        def _train_step(self, batch: Batch) -> bool:
            if not when(self.progress):
                return super()._train_step(batch)
            self._set_lr()  # the history tells of the last one
            self.progress.batch += 1
            self.progress.step += 1
            return True

    return LeavesOut


def spoil_gradient(when: When, value: float = float("inf")) -> type[Trainer]:
    """A trainer that meets a gradient with one such number in some steps; the loss is sound."""

    class Spoilt(Trainer):
        def _is_usable(self, loss: Tensor) -> bool:
            if when(self.progress):
                gradient = self.task.network.get_parameter("head.weight").grad
                assert gradient is not None
                gradient[1, 2] = value
            return super()._is_usable(loss)

    return Spoilt


def assert_finite(tensors: Mapping[str, Tensor]) -> None:
    assert tensors
    assert [name for name, tensor in tensors.items() if not tensor.isfinite().all()] == []


def at_steps(*steps: int) -> When:
    return lambda at: at.step in steps


# --- a step is skipped ---------------------------------------------------------------------------

FAULTS: dict[str, Callable[[When], type[Trainer]]] = {
    "a loss of nan": corrupt,
    "a loss of inf": lambda when: corrupt(when, float("inf")),
    "a variance that overflows": lambda when: corrupt(when, 1e25),  # with a finite loss and gradient
    "a gradient of inf": spoil_gradient,
    "a gradient of nan": lambda when: spoil_gradient(when, float("nan")),
    "a gradient whose square overflows": lambda when: spoil_gradient(when, 1e30),
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_skipped_step_leaves_no_trace(
    image_folder: Path, tmp_path: Path, fault: str, optimizer: str
) -> None:
    """Weights, running statistics, optimiser and average are those of a run without that step."""
    settings, when = EVERYTHING_ON | {"optimizer": optimizer, "epochs": 2}, at_steps(7)
    one = build_trainer(image_folder, tmp_path / "one", trainer_type=FAULTS[fault](when), **settings)
    two = build_trainer(image_folder, tmp_path / "two", trainer_type=leave_out(when), **settings)
    assert (one.fit().skipped, two.fit().skipped) == (1, 0)
    assert_same_end(tmp_path / "one", tmp_path / "two", but_for=COUNTERS)
    assert_finite(saved(tmp_path / "one").now.tensors)
    assert len(warnings(one)) == 1
    assert "at step 8 (epoch 2, batch 3); this step is skipped" in warnings(one)[0]


def test_the_very_first_step_may_be_skipped(image_folder: Path, tmp_path: Path) -> None:
    """Before it there is no optimiser state that could be given back."""
    for name, trainer_type in (("one", corrupt(at_steps(0))), ("two", leave_out(at_steps(0)))):
        build_trainer(image_folder, tmp_path / name, trainer_type=trainer_type, **EVERYTHING_ON).fit()
    assert_same_end(tmp_path / "one", tmp_path / "two", but_for=COUNTERS)


def test_three_in_a_row_are_skipped_at_the_seam_of_two_epochs_too(image_folder: Path, tmp_path: Path) -> None:
    when = at_steps(3, 4, 5, 9, 10, 11)
    one = build_trainer(image_folder, tmp_path / "one", trainer_type=corrupt(when), **EVERYTHING_ON)
    build_trainer(image_folder, tmp_path / "two", trainer_type=leave_out(when), **EVERYTHING_ON).fit()
    progress = one.fit()
    assert (progress.skipped, progress.skipped_in_row, progress.rollbacks) == (6, 0, 0)
    assert_same_end(tmp_path / "one", tmp_path / "two", but_for=COUNTERS)


def test_images_of_a_skipped_step_do_not_count(image_folder: Path, tmp_path: Path) -> None:
    """The mean training loss of an epoch is over the images that were learnt from."""
    trainer = build_trainer(
        image_folder, tmp_path, trainer_type=corrupt(at_steps(0, 1, 2)), epochs=1, batch_size=8, lr=1e-9
    )
    assert trainer.fit().history[0]["train_loss"] == pytest.approx(1.1, abs=0.3)


# --- training goes back --------------------------------------------------------------------------


class HalvedInTheSecond(Trainer):
    """Learns with half of all rates from the second epoch on."""

    def _set_lr(self) -> None:
        super()._set_lr()
        if self.progress.epoch:
            self.progress.lr /= 2
            for group in self.phase.optimizer.param_groups:
                group["lr"] /= 2


def test_a_fourth_in_a_row_leads_back_to_the_start_of_the_epoch_with_half_the_rate(
    image_folder: Path, tmp_path: Path
) -> None:
    trouble = corrupt(lambda at: at.rollbacks == 0 and at.step in (6, 7, 8, 9))
    one = build_trainer(image_folder, tmp_path / "one", trainer_type=trouble, **EVERYTHING_ON)
    two = build_trainer(image_folder, tmp_path / "two", trainer_type=HalvedInTheSecond, **EVERYTHING_ON)
    progress, _ = one.fit(), two.fit()
    assert (progress.rollbacks, progress.rate_factor, progress.skipped) == (1, 0.5, 0)
    assert ["skipped" in text for text in warnings(one)] == [True, True, True, False]
    assert warnings(one)[3].endswith("returns to the start of epoch 2, with 0.5 times the learning rate")
    assert_same_end(tmp_path / "one", tmp_path / "two", but_for=COUNTERS)


def test_an_eleventh_in_all_leads_back_too(image_folder: Path, tmp_path: Path) -> None:
    trouble = corrupt(lambda at: at.rollbacks == 0 and at.step % 2 == 1)
    trainer = build_trainer(image_folder, tmp_path, trainer_type=trouble, epochs=5, batch_size=8, lr=0.01)
    progress = trainer.fit()
    assert ["skipped" in text for text in warnings(trainer)] == [True] * 10 + [False]
    assert (progress.rollbacks, progress.step) == (1, 25)
    assert progress.skipped == 10  # those of the four epochs before; step 21 was the eleventh


def test_a_way_back_works_beside_decoding_processes(image_folder: Path, tmp_path: Path) -> None:
    """They have decoded batches ahead by then, which belong to a pass that was given up."""
    trouble = corrupt(lambda at: at.rollbacks == 0 and at.step < 4)
    settings: dict[str, Any] = {"epochs": 1, "batch_size": 5, "lr": 0.05, "trainer_type": trouble}
    for name, workers in (("one", 0), ("two", 1)):
        trainer = build_trainer(image_folder, tmp_path / name, workers=workers, **settings)
        assert trainer.fit().rollbacks == 1
        trainer.task.train.close()
    assert_same_end(tmp_path / "one", tmp_path / "two")


def test_what_was_learnt_of_the_machine_survives_the_way_back() -> None:
    start = Progress(epoch=1, step=5, skipped=2, history=[{"epoch": 1}])
    now = Progress(epoch=1, batch=3, step=8, skipped=5, skipped_in_row=3, rollbacks=1, rate_factor=0.5)
    now.microbatch, now.lost = 4, {"a.jpg": "gone"}
    back = roll_back(now, start)
    learnt = {"microbatch": 4, "lost": {"a.jpg": "gone"}, "rollbacks": 2, "rate_factor": 0.25}
    assert back == replace(start, **learnt)
    assert start.rollbacks == 0


class BadlyJudged(Trainer):
    """The validation loss of the second epoch is no number, the first time."""

    def _validate(self) -> Predictions:
        spoil = self.progress.epoch == 1 and self.progress.rollbacks == 0
        predictions = super()._validate()
        return replace(predictions, logits=predictions.logits * float("nan")) if spoil else predictions


def test_a_validation_loss_of_nan_leads_back(image_folder: Path, tmp_path: Path) -> None:
    one = build_trainer(image_folder, tmp_path / "one", trainer_type=BadlyJudged, **EVERYTHING_ON)
    two = build_trainer(image_folder, tmp_path / "two", trainer_type=HalvedInTheSecond, **EVERYTHING_ON)
    assert (one.fit().rollbacks, two.fit().rollbacks) == (1, 0)
    expected = "validation loss became nan after epoch 2; training returns to the start of epoch 2"
    assert expected in warnings(one)[0]
    assert_same_end(tmp_path / "one", tmp_path / "two", but_for=COUNTERS)


def test_patience_and_plateau_do_not_count_an_epoch_that_was_given_up(
    image_folder: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"epochs": 8, "batch_size": 12, "lr": 1e-9, "patience": 4}
    settings |= {"schedule": "plateau", "decay_epochs": 2}
    one = build_trainer(image_folder, tmp_path / "one", trainer_type=BadlyJudged, **settings)
    two = build_trainer(image_folder, tmp_path / "two", trainer_type=HalvedInTheSecond, **settings)
    assert one.fit().plateau_factor == two.fit().plateau_factor < 1
    assert metrics_of(one.progress) == metrics_of(two.progress)
    assert one.progress.bad_epochs == two.progress.bad_epochs == 4


# --- training ends -------------------------------------------------------------------------------


def test_trouble_without_end_ends_as_diverged(image_folder: Path, tmp_path: Path) -> None:
    trainer = build_trainer(
        image_folder, tmp_path, trainer_type=corrupt(lambda at: at.step >= 6), **EVERYTHING_ON
    )
    with pytest.raises(DivergedError, match="loss became nan at step 10") as ended:
        trainer.fit()
    assert ended.value.exit_code == ExitCode.DIVERGED == 76
    assert (trainer.progress.rollbacks, trainer.progress.rate_factor) == (2, 0.25)
    assert sum("skipped" in text for text in warnings(trainer)) == 9
    assert sum("returns to the start of epoch 2" in text for text in warnings(trainer)) == 2
    with safe_open(tmp_path / "diverged.safetensors", "pt") as file:
        met = Progress.from_json(file.metadata()["progress"])
        assert file.get_tensor("images").isnan().all()
    assert (met.epoch, met.batch, met.step) == (1, 4, 9)


def test_a_network_that_diverged_is_back_at_the_start_of_its_epoch(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CheckpointInterval, "is_due", lambda *_, **__: True)
    trainer = build_trainer(
        image_folder, tmp_path, trainer_type=corrupt(lambda at: at.step >= 6), **EVERYTHING_ON
    )
    with pytest.raises(DivergedError):
        trainer.fit()
    assert saved(tmp_path).now.progress.step > saved(tmp_path).epoch_start.progress.step == 5
    assert_same_tensors(trainer.state.take(), saved(tmp_path).epoch_start.tensors)


@pytest.mark.sample(2)
@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("network", [SmallNet, NormFree])
@pytest.mark.parametrize("rate", [1e10, 1e30, 1e38])
def test_a_huge_rate_ends_as_diverged_and_leaves_nothing_infinite(
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rate: float,
    network: type[SmallNet],
    ema_decay: float | None,
) -> None:
    """Even with a checkpoint after every step."""
    monkeypatch.setattr(CheckpointInterval, "is_due", lambda *_, **__: True)
    settings: dict[str, Any] = {"epochs": 3, "batch_size": 8, "lr": rate, "ema_decay": ema_decay}
    trainer = build_trainer(image_folder, tmp_path, network=network(), **settings)
    with pytest.raises(DivergedError):
        trainer.fit()
    assert_finite(trainer.task.network.state_dict())
    assert_finite(trainer.eval_network.state_dict())
    for checkpoint in (saved(tmp_path).now, saved(tmp_path).epoch_start):
        assert_finite(checkpoint.tensors)


def test_what_ended_a_training_can_be_replayed(image_folder: Path, tmp_path: Path) -> None:
    trainer = build_trainer(image_folder, tmp_path, epochs=3, batch_size=8, lr=1e30)
    with pytest.raises(DivergedError):
        trainer.fit()
    met = safetensors.torch.load_file(tmp_path / "diverged.safetensors")
    network = SmallNet()
    network.load_state_dict(
        {name.removeprefix("model."): met[name] for name in met if name.startswith("model.")}
    )
    loss = F.cross_entropy(network(met["images"]), met["labels"])
    assert not loss.isfinite()
    samples = trainer.task.train.samples
    assert [samples[index].label for index in met["indices"]] == met["labels"].tolist()


class Overflowing(Trainer):
    """The update of some steps is too large: it makes a weight infinite that no loss can tell of."""

    when: When = staticmethod(at_steps(9))  # the last of the second epoch

    def _update(self) -> None:
        super()._update()
        if self.when(self.progress) and self.progress.rollbacks == 0:
            self.task.network.get_parameter("stage1.1.bias").data[0] = -float("inf")  # ReLU makes it 0


def test_a_weight_that_overflows_unseen_leads_back(image_folder: Path, tmp_path: Path) -> None:
    trainer = build_trainer(image_folder, tmp_path, trainer_type=Overflowing, epochs=2, batch_size=8, lr=0.05)
    assert trainer.fit().rollbacks == 1
    expected = "the weights became infinite after epoch 2; training returns to the start"
    assert warnings(trainer)[0].startswith(expected)
    assert_finite(saved(tmp_path).now.tensors)


def test_no_checkpoint_holds_a_weight_that_overflowed(image_folder: Path, tmp_path: Path) -> None:
    """Instead it is of the start of the epoch, from where the same steps lead to the same end."""
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 0.05, "trainer_type": Overflowing}
    build_trainer(image_folder, tmp_path / "whole", **settings).fit()
    fit_until(build_trainer(image_folder, tmp_path / "parts", **settings), lambda at: at.step >= 10)
    found = saved(tmp_path / "parts")
    assert found.now.progress.step == 5
    assert_finite(found.now.tensors)
    build_trainer(image_folder, tmp_path / "parts", **settings).fit()
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


# --- and all of that interrupted -----------------------------------------------------------------


def all_kinds_of_trouble(at: Progress) -> bool:
    """One skip in the first epoch, three in the second, in the third a way back and a skip after it."""
    return at.step in ({2, 5, 6, 7, 12} if at.rollbacks else {2, 5, 6, 7, 11, 12, 13, 14})


@pytest.mark.sample(1)
@pytest.mark.parametrize("steps", slow_except([3, 8, 12], [2, 3, 6, 8, 10, 12, 14]))
def test_an_interruption_in_the_middle_of_trouble_changes_nothing(
    image_folder: Path, tmp_path: Path, steps: int
) -> None:
    settings = EVERYTHING_ON | {"trainer_type": corrupt(all_kinds_of_trouble)}
    whole = build_trainer(image_folder, tmp_path / "whole", **settings).fit()
    assert (whole.skipped, whole.rollbacks) == (5, 1)
    fit_until(build_trainer(image_folder, tmp_path / "parts", **settings), lambda at: at.step >= steps)
    build_trainer(image_folder, tmp_path / "parts", **settings).fit()
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


# --- float16 -------------------------------------------------------------------------------------

HALF: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 0.05, "precision": "float16", "ema_decay": 0.9}


def test_float16_finds_its_scale_without_counting_that_as_trouble(image_folder: Path, tmp_path: Path) -> None:
    trouble = spoil_gradient(lambda at: at.step < 6)
    trainer = build_trainer(image_folder, tmp_path, trainer_type=trouble, clip_grad=1.0, **HALF)
    progress = trainer.fit()
    assert (progress.skipped, progress.rollbacks, warnings(trainer)) == (0, 0, [])
    assert progress.scaler["scale"] == 65536 / 2**6
    assert_finite(saved(tmp_path).now.tensors)


def test_float16_skips_a_loss_of_nan_as_any_other(image_folder: Path, tmp_path: Path) -> None:
    for name, kind in (("one", corrupt), ("two", leave_out)):
        build_trainer(image_folder, tmp_path / name, trainer_type=kind(at_steps(7)), **HALF).fit()
    assert_same_end(tmp_path / "one", tmp_path / "two", but_for=(*COUNTERS, "scaler"))
    assert saved(tmp_path / "one").now.progress.skipped == 1
    assert saved(tmp_path / "one").now.progress.scaler["scale"] == 32768


def test_float16_gradients_that_stay_infinite_end_as_diverged(image_folder: Path, tmp_path: Path) -> None:
    trouble = spoil_gradient(lambda at: True)
    trainer = build_trainer(image_folder, tmp_path, trainer_type=trouble, **HALF | {"epochs": 5})
    with pytest.raises(DivergedError):
        trainer.fit()


def test_an_interruption_keeps_the_scale(image_folder: Path, tmp_path: Path) -> None:
    settings = HALF | {"trainer_type": spoil_gradient(at_steps(1, 2, 6))}
    build_trainer(image_folder, tmp_path / "whole", **settings).fit()
    fit_until(build_trainer(image_folder, tmp_path / "parts", **settings), lambda at: at.step >= 4)
    build_trainer(image_folder, tmp_path / "parts", **settings).fit()
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    assert saved(tmp_path / "parts").now.progress.scaler["scale"] == 8192
