"""The training loop.

::

    fit
      for each epoch
      |  for each batch ------------------------------------------------.
      |  |  rates  = base rates x schedule(step)                        |
      |  |  images = mixup or cutmix                     (if asked for) |
      |  |  loss   = cross entropy(network(images))                     |
      |  |  loss finite?  no: stop, before anything is changed          |
      |  |  backward, clip, optimiser step, average      (if asked for) |
      |  |  stop asked for?  save, and leave                            |
      |  '--------------------------------------------------------------'
      |  judge on the validation part
      |  best so far?  keep these weights
      |  write the history and the checkpoint
      |  patience over?  leave
      '

Random numbers of a step (dropout, mixup) come from (seed, step), and those of a view from (seed, epoch,
image): where a run was interrupted leaves no trace in its result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from finetune.data.loader import Batch, Loader
from finetune.display import Display
from finetune.errors import DivergedError, InterruptedRunError
from finetune.evaluation.predict import autocast, predict
from finetune.recipe import TrainingSettings
from finetune.runs.files import write_csv
from finetune.runs.folder import RunFolder
from finetune.runtime import Precision, seed_everything
from finetune.strategy.freeze import build_param_groups, freeze, set_train_mode
from finetune.strategy.matrix import Plan
from finetune.training.checkpoint import (
    Progress,
    load_checkpoint,
    network_tensors,
    optimizer_tensors,
    restore_network,
    restore_optimizer,
    save_checkpoint,
)
from finetune.training.finite import FiniteCheck
from finetune.training.narrator import Narrator
from finetune.training.optimizer import build_mixer, build_optimizer
from finetune.training.schedule import Plateau, Schedule
from finetune.training.standardize import NUM_MEASURED, attach, fold, measure_features

HISTORY_COLUMNS = (
    "epoch",
    "lr",
    "train_loss",
    "eval_loss",
    "eval_accuracy",
    "seconds",
    "images_per_second",
    "data_wait_fraction",
)


@dataclass(frozen=True)
class Task:
    """What is trained on what.

    Attributes:
        network: on its device, (B, 3, H, W) -> (B, K).
        plan: what learns, and how fast.
        loss: of (logits, labels or soft labels).
        train: shuffled training batches.
        val: validation batches, in order.
        num_classes: K.
    """

    network: nn.Module
    plan: Plan
    loss: nn.Module
    train: Loader
    val: Loader
    num_classes: int


class Trainer:
    """Trains a task as a recipe says, into a run folder.

    Args:
        task: network, plan, loss and data.
        settings: the recipe's section.
        precision: of the forward pass.
        seed: of everything random.
        folder: where checkpoints and history go.
        display: where progress is shown.
        stop_asked: read after every step; true means save and leave.
    """

    def __init__(
        self,
        task: Task,
        settings: TrainingSettings,
        *,
        precision: Precision,
        seed: int,
        folder: RunFolder,
        display: Display,
        stop_asked: Callable[[], bool] = lambda: False,
    ) -> None:
        self.task, self.settings, self.precision, self.seed = task, settings, precision, seed
        self.folder, self.display, self.stop_asked = folder, display, stop_asked
        self.device = task.train.placement.device
        freeze(task.network, task.plan)
        self.optimizer = build_optimizer(
            build_param_groups(task.network, task.plan, settings.weight_decay), settings
        )
        self.schedule = Schedule.from_settings(settings)
        self.mixer = build_mixer(settings, task.num_classes)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "float16")
        self.ema = (
            ModelEmaV3(task.network, settings.ema_decay, use_warmup=True) if settings.ema_decay else None
        )
        self.finite = FiniteCheck(self.device)
        self.progress = Progress()
        self._moments: dict[str, Tensor] = {}
        self.narrator = Narrator(display, settings.epochs, len(task.train.samples))
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)

    def standardize_head(self, keep: bool = False) -> None:
        """Let the classifier learn on standardised features (:mod:`finetune.training.standardize`).

        They are measured now, unless a checkpoint holds them already.

        Args:
            keep: the classifier is the network's own, and goes on computing what it did.
        """
        if self.folder.last_checkpoint.exists():
            tensors, _ = load_checkpoint(self.folder.last_checkpoint)
            moments = {k.removeprefix("moments."): v for k, v in tensors.items() if k.startswith("moments.")}
            self._moments = {name: tensor.to(self.device) for name, tensor in moments.items()}
        else:
            loader = self.task.train
            total = min(NUM_MEASURED, len(loader.samples))
            set_train_mode(self.task.network, self.task.plan)
            seed_everything(self.seed, "measure")
            with self.display.track("measuring features", total) as advance:
                self._moments = measure_features(self.task.network, loader, self.precision, advance)
        attach(self.task.network, self._moments, keep)
        if self.ema is not None:
            attach(self.ema.module, self._moments, keep)

    @property
    def judged(self) -> nn.Module:
        """The network whose figures count: the average of the weights where one is kept."""
        return self.ema.module if self.ema is not None else self.task.network

    # --- the loop --------------------------------------------------------------------------------

    def fit(self) -> Progress:
        """Train to the end, from the last checkpoint when there is one; the judged network ends at its best.

        Raises:
            DivergedError: the loss is not finite; weights and checkpoint are those before it.
            InterruptedRunError: a stop was asked for; the checkpoint is of the last whole step.
        """
        if self.folder.last_checkpoint.exists():
            self._restore()
        self.narrator.begin(self.progress)
        while self.progress.epoch < self.settings.epochs and not self._out_of_patience():
            self._train_epoch()
            self._finish_epoch()
        tensors, best = load_checkpoint(self.folder.best_checkpoint)
        restore_network(self.judged, tensors, "model.")
        # Both files are whole, but a kill may have come between them: figures go with the weights.
        self.progress.best, self.progress.best_epoch = best.best, best.best_epoch
        fold(self.judged)
        return self.progress

    def _train_epoch(self) -> None:
        progress, loader = self.progress, self.task.train
        set_train_mode(self.task.network, self.task.plan)
        steps_per_epoch = loader.num_batches(progress.epoch)
        began, seconds_before, waited_before = (
            time.perf_counter(),
            progress.epoch_seconds,
            progress.wait_seconds,
        )
        with self.narrator.bar(progress, "training", len(loader.samples), progress.num_seen) as advance:
            for batch in loader.batches(progress.epoch, start=progress.batch):
                self._train_step(batch, steps_per_epoch)
                progress.epoch_seconds = seconds_before + time.perf_counter() - began
                progress.wait_seconds = waited_before + loader.wait_seconds
                advance(len(batch.labels), self.narrator.words(progress))
                if self.stop_asked():
                    self._stop()

    def _train_step(self, batch: Batch, steps_per_epoch: int) -> None:
        self._set_rates(steps_per_epoch)
        seed_everything(self.seed, "step", self.progress.step)
        loss = self._forward(batch)
        self.finite.start(loss)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if not self.finite.wait():
            at = self.progress
            where = f"step {at.step + 1} (epoch {at.epoch + 1}, batch {at.batch + 1})"
            raise self._diverged(f"loss became {loss.item()} at {where}; it did not reach the weights")
        self._update()
        self._loss_sum += loss.detach().double() * len(batch.labels)
        self.progress.num_seen += len(batch.labels)
        self.progress.batch += 1
        self.progress.step += 1

    def _forward(self, batch: Batch) -> Tensor:
        images, labels = batch.images, batch.labels
        if self.mixer is not None:
            images, labels = self.mixer(images, labels)
        with autocast(self.device, self.precision):
            loss: Tensor = self.task.loss(self.task.network(images).float(), labels)
        return loss

    def _update(self) -> None:
        if self.settings.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.task.network.parameters(), self.settings.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.task.network, step=self.progress.step)

    def _set_rates(self, steps_per_epoch: int) -> None:
        factor = self.schedule.factor(self.progress.step, steps_per_epoch) * self.progress.plateau_factor
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.progress.lr = self.optimizer.param_groups[-1]["lr"]  # groups go from stem to head

    # --- the end of an epoch ---------------------------------------------------------------------

    def _finish_epoch(self) -> None:
        figures = self._judge()
        improved = self._is_better(figures)
        self._observe(figures, improved)
        self._record(figures)
        if improved:
            self._save_best()
        self._begin_next_epoch()
        self._save()
        if self.stop_asked() and self.progress.epoch < self.settings.epochs:
            raise self._interrupted()

    def _judge(self) -> dict[str, float]:
        with self.narrator.bar(self.progress, "validating", len(self.task.val.samples)) as advance:
            predictions = predict(self.judged, self.task.val, self.precision, lambda done: advance(done, ""))
        if not math.isfinite(predictions.loss):
            raise self._diverged(
                f"validation loss became {predictions.loss} after epoch {self.progress.epoch + 1}"
            )
        return {"accuracy": predictions.accuracy, "loss": predictions.loss}

    def _is_better(self, figures: dict[str, float]) -> bool:
        """Higher accuracy, a lower loss among equals; or the lower loss alone."""
        best = self.progress.best
        if not best:
            return True
        if self.settings.monitor == "loss":
            return figures["loss"] < best["loss"]
        return (figures["accuracy"], -figures["loss"]) > (best["accuracy"], -best["loss"])

    def _observe(self, figures: dict[str, float], improved: bool) -> None:
        progress = self.progress
        progress.bad_epochs = 0 if improved else progress.bad_epochs + 1
        if improved:
            progress.best, progress.best_epoch = figures, progress.epoch
        if self.settings.schedule == "plateau":
            plateau = Plateau(
                self.settings.decay_epochs,
                self.settings.decay_rate,
                progress.plateau_factor,
                progress.plateau_bad_epochs,
            )
            plateau.observe(improved)
            progress.plateau_factor, progress.plateau_bad_epochs = plateau.factor, plateau.bad_epochs

    def _out_of_patience(self) -> bool:
        patience = self.settings.patience
        return patience is not None and self.progress.bad_epochs >= patience

    def _record(self, figures: dict[str, float]) -> None:
        progress = self.progress
        seconds = max(progress.epoch_seconds, 1e-9)
        row = {
            "epoch": progress.epoch + 1,
            "lr": progress.lr,
            "train_loss": self._loss_sum.item() / max(progress.num_seen, 1),
            "eval_loss": figures["loss"],
            "eval_accuracy": figures["accuracy"],
            "seconds": round(seconds, 3),
            "images_per_second": round(progress.num_seen / seconds, 2),
            "data_wait_fraction": round(progress.wait_seconds / seconds, 4),
        }
        progress.history.append(row)
        write_csv(self.folder.history, [tuple(row.values()) for row in progress.history], HISTORY_COLUMNS)
        self.narrator.say_epoch(row, is_best=progress.best_epoch == progress.epoch)

    def _begin_next_epoch(self) -> None:
        progress = self.progress
        progress.epoch, progress.batch, progress.num_seen = progress.epoch + 1, 0, 0
        progress.epoch_seconds = progress.wait_seconds = 0.0
        self._loss_sum.zero_()

    # --- stopping and going on -------------------------------------------------------------------

    def _save(self) -> None:
        self.progress.loss_sum = self._loss_sum.item()
        self.progress.scaler = self.scaler.state_dict()
        tensors = network_tensors(self.task.network, "model.") | optimizer_tensors(
            self.task.network, self.optimizer
        )
        tensors |= {f"moments.{name}": tensor for name, tensor in self._moments.items()}
        if self.ema is not None:
            tensors |= network_tensors(self.ema.module, "ema.")
        save_checkpoint(self.folder.last_checkpoint, tensors, self.progress)

    def _save_best(self) -> None:
        moments = {f"moments.{name}": tensor for name, tensor in self._moments.items()}
        save_checkpoint(
            self.folder.best_checkpoint, network_tensors(self.judged, "model.") | moments, self.progress
        )

    def _restore(self) -> None:
        tensors, self.progress = load_checkpoint(self.folder.last_checkpoint)
        restore_network(self.task.network, tensors, "model.")
        restore_optimizer(self.task.network, self.optimizer, tensors)
        if self.ema is not None:
            restore_network(self.ema.module, tensors, "ema.")
        if self.progress.scaler:
            self.scaler.load_state_dict(self.progress.scaler)
        self._loss_sum.fill_(self.progress.loss_sum)

    def _stop(self) -> None:
        self._save()
        raise self._interrupted()

    def _interrupted(self) -> InterruptedRunError:
        found = f"it was interrupted after step {self.progress.step}, in epoch {self.progress.epoch + 1}"
        fix = f"Give the same command again, with --output {self.folder.path}, to go on from there."
        return InterruptedRunError("training", found, fix)

    def _diverged(self, what: str) -> DivergedError:
        fix = "Lower --lr, or --set training.warmup_epochs=1 or training.clip_grad=1, with a new --output."
        return DivergedError("training", f"the {what}, with a rate of {self.progress.lr:g}", fix)
