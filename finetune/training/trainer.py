"""The training loop.

::

    fit
      for each epoch
      |  new phase?  freeze again, with a new optimizer
      |  for each batch ------------------------------------------------.
      |  |  lr     = base lr x schedule(step), for each group           |
      |  |  images = mixup or cutmix                     (if asked for) |
      |  |  loss   = loss(network(images), labels), and its gradient    |
      |  |           in smaller microbatches when memory runs out,      |
      |  |           summed over ranks                                  |
      |  |  not finite?  skip, return to the epoch's start, or stop     |
      |  |  clip, optimizer step, moving average                        |
      |  |  stop requested?  save and leave                             |
      |  '--------------------------------------------------------------'
      |  validate
      |  best epoch so far?  keep its weights
      |  write the history, and a checkpoint if one is due
      |  patience exceeded?  leave
      '

Random numbers of a step come from (seed, step), those of a view from (seed, epoch, image), so the result does
not depend on where a run was interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from finetune.data.loader import Batch
from finetune.data.scan import refuse_many_lost
from finetune.evaluation.predictions import Predictions, predict
from finetune.recipe import TrainingSettings
from finetune.runs.bad_images import add_lost_images
from finetune.runs.folder import RunFolder
from finetune.system.device import Precision
from finetune.system.display import Display
from finetune.system.distributed import SINGLE_PROCESS, Distributed
from finetune.training import recovery
from finetune.training.checkpoint import CheckpointInterval, CheckpointStore, estimate_bytes
from finetune.training.ddp import Replicas, agree, average_statistics, find_share
from finetune.training.freeze import frozen_tensors, set_train_mode
from finetune.training.kept_epochs import keep_epoch
from finetune.training.optim import Schedule, build_mixer, is_over, record_validation
from finetune.training.phase_optimizer import PhaseOptimizer
from finetune.training.reporting import Listener, ProgressReporter, add_row, write_history
from finetune.training.standardize import NUM_MEASURED, attach, fold, measure_features
from finetune.training.state import Checkpoint, Progress, Snapshot, State
from finetune.training.step import BufferBackup, Gradient, MicrobatchRunner, has_enough_images, min_microbatch
from finetune.training.task import Task, build_forward, choose_microbatch


class Trainer:
    """Trains a task as a recipe says, and writes its history and checkpoints.

    Args:
        task: network, plan, loss and data.
        settings: section ``training`` of the recipe.
        precision: precision of the forward pass.
        seed: seed of all random numbers.
        folder: run folder, for the history.
        store: store of the checkpoints.
        start: checkpoint to resume from; None starts a new training.
        display: display that shows the progress.
        stop_asked: called after every step; True means save and leave.
        on_history: called with the rows of the history after every epoch.
        distributed: ranks that train together; rank 0 writes files.
    """

    def __init__(
        self,
        task: Task,
        settings: TrainingSettings,
        *,
        precision: Precision,
        seed: int,
        folder: RunFolder,
        store: CheckpointStore,
        start: Checkpoint | None = None,
        display: Display,
        stop_asked: Callable[[], bool] = lambda: False,
        on_history: Listener = lambda _: None,
        distributed: Distributed = SINGLE_PROCESS,
    ) -> None:
        self.task, self.settings, self.precision, self.seed = task, settings, precision, seed
        self.folder, self.store, self.display = folder, store, display
        self.stop_asked, self.on_history, self.distributed = stop_asked, on_history, distributed
        self.device = task.train.placement.device
        self.schedule = Schedule.from_settings(settings)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "float16")
        self._mixer = build_mixer(settings, task.num_classes)
        self._forward = build_forward(task, settings.compile, display)
        self.progress = Progress(microbatch=settings.microbatch or choose_microbatch(task))
        self._enter_phase()
        decay = settings.ema_decay
        self.ema = ModelEmaV3(task.network, decay, use_warmup=True) if decay else None
        average = self.ema.module if self.ema is not None else None
        frozen = frozen_tensors(task.network, task.plan)
        self.state = State(task.network, self.phase.optimizer, average, frozen)
        self.reporter = ProgressReporter(display, settings.epochs, len(task.train.samples))
        self._start, self._best = start, start.best if start else None
        self._saved: Snapshot | None = None
        self._best_predictions: Predictions | None = None
        self._moments: dict[str, Tensor] = {}
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)

    def standardize_head(self, keep: bool = False, measure: bool = True) -> None:
        """Train the classifier on standardised features (:mod:`finetune.training.standardize`).

        Mean and deviation are measured now, or read from the checkpoint if the training resumes.

        Args:
            keep: adjust the weights so that the classifier computes the same function as before.
            measure: false leaves the features of a new training as they are.
        """
        if self._start is not None:
            moments = self._start.now.under("moments.")
        else:
            moments = self.distributed.share(self._measure_features) if measure else {}
        self._moments = {name: tensor.to(self.device) for name, tensor in moments.items()}
        for network in {self.task.network, self.eval_network}:
            attach(network, self._moments, keep)

    def _measure_features(self) -> dict[str, Tensor]:
        network, loader = self.task.network, self.task.train
        set_train_mode(network, self.phase.plan)
        with self.display.track("measuring features", min(NUM_MEASURED, len(loader.samples))) as advance:
            forward, microbatch = self.task.forward(network), self.progress.microbatch
            return measure_features(network, loader, self.precision, self.seed, advance, forward, microbatch)

    @property
    def predictions(self) -> Predictions:
        """Predictions on the validation split in the best epoch; available after :meth:`fit`."""
        assert self._best_predictions is not None
        return self._best_predictions

    @property
    def eval_network(self) -> nn.Module:
        """The network that is evaluated and exported: the average of the weights if there is one."""
        return self.state.eval_network

    # --- the loop --------------------------------------------------------------------------------

    def fit(self) -> Progress:
        """Train to the end; :attr:`eval_network` then has the weights of the best epoch.

        Raises:
            DivergedError: losses or gradients stay non-finite; the weights are those from before.
            InterruptedRunError: a stop was requested; a checkpoint of the last complete step was written.
            EnvironmentFaultError: memory runs out even with the smallest microbatch.
            DiskError: a checkpoint cannot be written; the previous one is kept.
        """
        self._begin()
        while not is_over(self.progress, self.settings):
            if self._train_epoch():
                self._finish_epoch()
        self.phase.check_frozen()
        if self._saved is not self._epoch_start:
            self._save()  # evaluation and export follow, and may be killed too
        if self._is_stop_asked():
            raise recovery.interrupted_error(self.progress, self.folder)
        assert self._best is not None
        self.state.restore_eval_weights(self._best.tensors)
        # If the best epoch was in an earlier process: its predictions again, bitwise the same.
        if self._best_predictions is None:
            self._best_predictions = self._validate()
        fold(self.eval_network)
        return self.progress

    def _begin(self) -> None:
        if self._start is not None:
            self._go_to(self._start.now)
            self._epoch_start, self._saved = self._start.epoch_start, self._start.now
            self._tell_history()
        else:
            self.progress.steps_per_epoch = self.task.train.num_batches()
            self._epoch_start = self._take()
        self._start = None
        num_bytes = estimate_bytes(self._epoch_start, self.settings)
        if self.distributed.is_main:
            self.store.check_space(num_bytes)
        self.pace = CheckpointInterval(num_bytes)
        self.reporter.begin(self.progress)

    def _train_epoch(self) -> bool:
        """Train the rest of an epoch; return False after a rollback to its start."""
        progress, loader = self.progress, self.task.train
        self.phase.begin_epoch()
        self._buffers = BufferBackup(self.task.network)
        began = time.perf_counter()
        seconds_before, waited_before = progress.epoch_seconds, progress.wait_seconds
        with self.reporter.bar(progress, "training", len(loader.samples), progress.num_seen) as advance:
            for batch in loader.batches(progress.epoch, start=progress.batch):
                if not self._train_step(batch):
                    return False
                progress.epoch_seconds = seconds_before + time.perf_counter() - began
                progress.wait_seconds = waited_before + loader.wait_seconds
                self.display.heartbeat.step = progress.step
                advance(len(batch.labels), self.reporter.describe_speed(progress))
                self._save_or_stop()
        return True

    def _train_step(self, batch: Batch) -> bool:
        """Train on one batch; return False after a rollback to the start of the epoch."""
        least, mixes = min_microbatch(self.task.network), self.gradient.mixer is not None
        share = find_share(self.distributed, batch, self.task.loss, mixes, least)
        if share.lost:
            self._record_lost(share.lost)
        if has_enough_images(self.task.network, share.num_images, bool(share.lost)):
            self._set_lr()
            self._buffers.keep()
            loss = self.microbatches.compute(share, self.progress, self._buffers)
            loss, usable = agree(self.distributed, loss, self._is_usable(loss))
            if usable:
                average_statistics(
                    self.distributed, self.task.network, len(share.batch.labels), share.num_images
                )
                self._update()
                self._loss_sum += loss.double() * share.num_images
                self.progress.num_seen += share.num_images
                self.progress.skipped_in_row = 0
            elif not self._recover(batch, loss):
                return False
        self.progress.batch += 1
        self.progress.step += 1
        return True

    def _set_lr(self) -> None:
        progress = self.progress
        factor = self.schedule.factor(progress.step, progress.steps_per_epoch)
        factor *= progress.plateau_factor * progress.rate_factor
        progress.lr = self.phase.set_lr(factor)

    def _is_usable(self, loss: Tensor) -> bool:
        return self.phase.is_usable(loss, self._buffers.add_up())

    def _update(self) -> None:
        self.phase.step()
        if self.ema is not None:
            self.ema.update(self.task.network, step=self.progress.step)

    # --- lost images and non-finite steps --------------------------------------------------------

    def _record_lost(self, lost: Mapping[str, str]) -> None:
        """Record unreadable training images and warn; refuse to continue if there are many."""
        for path in lost.keys() - self.progress.lost.keys():
            self.display.warn(f"{path} can no longer be read ({lost[path]}); training continues without it")
        self.progress.lost |= lost
        if self.distributed.is_main:
            add_lost_images(self.folder, self.progress.lost)
        refuse_many_lost(self.progress.lost, len(self.task.train.samples))

    def _recover(self, batch: Batch, loss: Tensor) -> bool:
        """Handle a non-finite step: skip it, roll back (return False) or stop."""
        self._buffers.restore()
        self.phase.skip()
        action, found = recovery.choose_action(self.progress), recovery.describe(self.progress, loss)
        if action is recovery.RecoveryAction.SKIP:
            self.progress.skipped += 1
            self.progress.skipped_in_row += 1
            self.display.warn(f"the {found}; this step is skipped")
            return True
        if action is recovery.RecoveryAction.STOP and self.distributed.is_main:
            recovery.save_diverged_batch(self.folder, batch, self.state.take(), self.progress)
        self._roll_back(action, found)
        return False

    def _roll_back(self, action: recovery.RecoveryAction, found: str) -> None:
        if action is recovery.RecoveryAction.STOP:
            self.state.restore(self._epoch_start.tensors)
            raise recovery.diverged_error(self.progress, found)
        progress = recovery.roll_back(self.progress, self._epoch_start.progress)
        self._epoch_start = Snapshot(self._epoch_start.tensors, progress)
        self._go_to(self._epoch_start)
        self.display.warn(
            f"the {found}; training returns to the start of epoch {progress.epoch + 1}, with "
            f"{progress.rate_factor:g} times the learning rate"
        )

    # --- the end of an epoch ---------------------------------------------------------------------

    def _finish_epoch(self) -> None:
        predictions = self._validate()
        metrics = self.task.train.target.compute_monitored(predictions.logits, predictions.labels)
        if fault := recovery.find_fault(metrics["loss"], self.state):
            self._roll_back(
                recovery.choose_rollback(self.progress), f"{fault} after epoch {self.progress.epoch + 1}"
            )
            return
        improved = record_validation(self.progress, metrics, self.settings)
        self._record(metrics)
        if improved:
            self._best_predictions = predictions
            self._best = Snapshot(self.state.take_eval_weights(), self.progress.copy())
        self._begin_next_epoch()
        self._epoch_start = self._take()
        if not is_over(self.progress, self.settings):
            self._save_or_stop()

    def _validate(self) -> Predictions:
        with self.reporter.bar(self.progress, "validating", len(self.task.val.samples)) as advance:

            def on_batch(done: int) -> None:
                advance(done, "")
                if self._is_stop_asked():  # a long validation must not outlast the grace time
                    self._save_and_leave()

            network = self.eval_network
            forward = self.task.forward(network)
            return predict(network, self.task.val, self.precision, on_batch, forward, self.distributed)

    def _record(self, metrics: dict[str, float]) -> None:
        row = add_row(self.progress, metrics, self._loss_sum.item())
        self._tell_history()
        keep_epoch(self.folder, self.settings, self.progress, self.state, self.distributed)
        self.reporter.report_epoch(row, is_best=self.progress.best_epoch == self.progress.epoch)

    def _tell_history(self) -> None:
        if self.distributed.is_main:
            write_history(self.folder.history, self.progress, self.on_history)

    def _begin_next_epoch(self) -> None:
        progress = self.progress
        progress.epoch, progress.batch, progress.num_seen = progress.epoch + 1, 0, 0
        progress.epoch_seconds = progress.wait_seconds = 0.0
        self._loss_sum.zero_()
        self._follow_plan()

    # --- phases ----------------------------------------------------------------------------------

    def _enter_phase(self) -> None:
        """Freeze the network for the phase of this epoch, and create its optimizer."""
        task, distributed, scaler, forward = self.task, self.distributed, self.scaler, self._forward
        self.phase = PhaseOptimizer(task.network, task.plan, self.progress.epoch, self.settings, scaler)
        replicas = Replicas(task.network, forward, distributed) if distributed.size > 1 else None
        self.gradient = Gradient(
            task.network, task.loss, self._mixer, scaler, self.precision, forward, replicas
        )
        self.microbatches = MicrobatchRunner(
            task, self.gradient, self.phase.optimizer, self.seed, distributed, self.display
        )

    def _follow_plan(self) -> None:
        """Enter the phase of this epoch if it differs from the current one."""
        if self.task.plan.at(self.progress.epoch) is not self.phase.plan:
            self.phase.check_frozen()
            self._enter_phase()
            self.state.optimizer = self.phase.optimizer

    # --- stopping and resuming -------------------------------------------------------------------

    def _take(self) -> Snapshot:
        """Return a snapshot of everything that training changes."""
        self.progress.loss_sum = self._loss_sum.item()
        self.progress.scaler = self.scaler.state_dict()
        moments = {f"moments.{name}": tensor.cpu() for name, tensor in self._moments.items()}
        return Snapshot(self.state.take() | moments, self.progress.copy())

    def _go_to(self, snapshot: Snapshot) -> None:
        self.progress = snapshot.progress.copy()
        self._follow_plan()
        self.display.heartbeat.step = self.progress.step
        self.state.restore(snapshot.tensors)
        if self.progress.scaler:
            self.scaler.load_state_dict(self.progress.scaler)
        self._loss_sum.fill_(self.progress.loss_sum)

    def _is_stop_asked(self) -> bool:
        """Return whether any rank was asked to stop, so that all stop after the same step."""
        return self.distributed.any(self.stop_asked())

    def _save_or_stop(self) -> None:
        """Write a checkpoint if one is due; if a stop was requested, write one and leave."""
        if self._is_stop_asked():
            self._save_and_leave()
        if self.distributed.is_main and self.pace.is_due(inside_epoch=self.progress.batch > 0):
            self._save()

    def _save_and_leave(self) -> None:
        self._save()
        self.distributed.wait()  # a rank that ends early looks like one that failed
        raise recovery.interrupted_error(self.progress, self.folder)

    def _save(self) -> None:
        """Write a checkpoint; if weights overflowed, write the state at the start of the epoch instead."""
        now = self._take() if self.progress.batch and self.state.is_finite() else self._epoch_start
        if self.distributed.is_main:
            self.display.heartbeat.send({"saving": True})
            self.store.save(Checkpoint(now, self._epoch_start, self._best))
            self.display.heartbeat.send({"saving": False})
        self.pace.wrote(self.store.seconds)
        self._saved = now
