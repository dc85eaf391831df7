"""Recovery from a non-finite loss or gradient: skip the step, return to the epoch's start, or stop.

::

    not finite -> skip the step                      up to 3 in a row, 10 in all
               -> return to the start of the epoch   with half the lr, up to 2 times
               -> stop as diverged                   and save the batch for a replay

Training returns to the start of an epoch, not to a checkpoint: checkpoints are written by the clock, so the
result would depend on timing.
"""

from __future__ import annotations

import math
from contextlib import suppress
from enum import Enum, auto

import safetensors.torch
from torch import Tensor

from finetune.data.loader import Batch
from finetune.errors import DiskError, DivergedError, InterruptedRunError
from finetune.runs.files import write_bytes
from finetune.runs.folder import RunFolder
from finetune.training.state import Checkpoint, Progress, Snapshot, State

SKIPS_IN_A_ROW = 3
SKIPS_IN_ALL = 10
ROLLBACKS = 2
RATE_FACTOR = 0.5


class RecoveryAction(Enum):
    """How training continues after a non-finite step."""

    SKIP = auto()
    ROLL_BACK = auto()
    STOP = auto()


def choose_action(progress: Progress) -> RecoveryAction:
    """Return the action after a non-finite step; the progress counts the earlier ones."""
    if progress.skipped_in_row < SKIPS_IN_A_ROW and progress.skipped < SKIPS_IN_ALL:
        return RecoveryAction.SKIP
    return choose_rollback(progress)


def choose_rollback(progress: Progress) -> RecoveryAction:
    """Return the action if skipping is not possible: roll back, or stop after too many rollbacks."""
    return RecoveryAction.ROLL_BACK if progress.rollbacks < ROLLBACKS else RecoveryAction.STOP


def find_fault(loss: float, state: State) -> str:
    """Return what is non-finite after an epoch, for a message; empty if everything is finite."""
    if not math.isfinite(loss):
        return f"validation loss became {loss}"
    return "" if state.is_finite() else "weights became infinite"


def roll_back(now: Progress, start: Progress) -> Progress:
    """Return the progress at the start of the epoch, with the rollback counted and the lr halved."""
    back = start.copy()
    back.rollbacks, back.rate_factor = now.rollbacks + 1, now.rate_factor * RATE_FACTOR
    back.microbatch, back.lost = now.microbatch, dict(now.lost)
    return back


def restart_epoch(checkpoint: Checkpoint, steps_per_epoch: int) -> Checkpoint:
    """Return a checkpoint at the start of its epoch, for a new number of steps per epoch.

    For a run that resumes with other images or another batch size, so that its position inside the epoch is
    no longer valid.
    """
    progress = checkpoint.epoch_start.progress.copy()
    progress.step, progress.steps_per_epoch = progress.epoch * steps_per_epoch, steps_per_epoch
    start = Snapshot(checkpoint.epoch_start.tensors, progress)
    return Checkpoint(start, start, checkpoint.best)


def drop_optimizer(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint at the start of an epoch without the optimizer's tensors: it starts afresh."""
    before = checkpoint.epoch_start
    tensors = {name: tensor for name, tensor in before.tensors.items() if not name.startswith("optimizer.")}
    start = Snapshot(tensors, before.progress)
    return Checkpoint(start, start, checkpoint.best)


def describe(progress: Progress, loss: Tensor) -> str:
    """Return what is non-finite in a step, and which step it is, for a message."""
    nan = "gradient, or a running statistic of the features, became infinite or nan"
    what = nan if loss.isfinite() else f"loss became {loss.item()}"
    return f"{what} at step {progress.step + 1} (epoch {progress.epoch + 1}, batch {progress.batch + 1})"


def diverged_error(progress: Progress, found: str) -> DivergedError:
    """Return the error of a training that stays non-finite after every rollback."""
    fix = "Lower --lr, or --set training.warmup_epochs=1 or training.clip_grad=1, with a new --output."
    return DivergedError("training", f"the {found}, with a learning rate of {progress.lr:g}", fix)


def interrupted_error(progress: Progress, folder: RunFolder) -> InterruptedRunError:
    """Return the error of a training that was asked to stop and has written a checkpoint."""
    found = f"it was interrupted after step {progress.step}, in epoch {progress.epoch + 1}"
    fix = f"Run the same command again, with --output {folder.path}, to resume."
    error = InterruptedRunError("training", found, fix)
    error.output = str(folder.path)
    return error


def save_diverged_batch(
    folder: RunFolder, batch: Batch, tensors: dict[str, Tensor], progress: Progress
) -> None:
    """Write the batch that ended a training, and the weights at that step, to ``diverged.safetensors``.

    It holds ``images`` (B, 3, H, W) as the network gets them (before mixup), ``labels`` and ``indices`` (B,),
    and the trained tensors under ``model.``; the header holds the progress.
    """
    content = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    content |= {"images": batch.images, "labels": batch.labels, "indices": batch.indices}
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in content.items()}
    with suppress(DiskError):  # a full disk must not hide why training ended
        write_bytes(folder.diverged, safetensors.torch.save(plain, {"progress": progress.to_json()}))
