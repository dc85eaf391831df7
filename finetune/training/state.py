"""The state of a training: the tensors that change (:class:`State`) and its counters (:class:`Progress`).

A :class:`Snapshot` is a copy of both, and a :class:`Checkpoint` holds the snapshots that resuming needs.
Frozen tensors are left out: every run verifies at its end that they did not change.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from functools import reduce
from operator import and_
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import DataError, count
from finetune.targets import SCORES


class State:
    """The tensors that training changes.

    Args:
        network: network that is trained.
        optimizer: its optimizer.
        average: moving average of the network's weights; None if there is none.
        frozen: names of tensors that never change.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: nn.Module | None,
        frozen: Collection[str],
    ) -> None:
        self.network, self.optimizer, self.average = network, optimizer, average
        self.frozen = frozenset(frozen)

    @property
    def eval_network(self) -> nn.Module:
        """The network that is evaluated and exported: the average of the weights if there is one."""
        return self.network if self.average is None else self.average

    def is_finite(self) -> bool:
        """Return whether every weight is finite; an update may overflow even if its gradient is finite."""
        networks = [self.network] if self.average is None else [self.network, self.average]
        weights = [weight.detach() for network in networks for weight in network.parameters()]
        return is_finite(add_up([weight for weight in weights if weight.numel()]))

    def take(self) -> dict[str, Tensor]:
        """Return copies of all tensors on the CPU, by name."""
        tensors = network_tensors(self.network, "model.", self.frozen)
        tensors |= optimizer_tensors(self.network, self.optimizer)
        if self.average is not None:
            tensors |= network_tensors(self.average, "ema.", self.frozen)
        return _copies(tensors)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the tensors that :meth:`take` returned."""
        restore_network(self.network, tensors, "model.", self.frozen)
        restore_optimizer(self.network, self.optimizer, tensors)
        if self.average is not None:
            restore_network(self.average, tensors, "ema.", self.frozen)

    def take_eval_weights(self) -> dict[str, Tensor]:
        """Return copies of the weights of :attr:`eval_network` on the CPU, by name."""
        return _copies(network_tensors(self.eval_network, "model.", self.frozen))

    def restore_eval_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the weights that :meth:`take_eval_weights` returned."""
        restore_network(self.eval_network, tensors, "model.", self.frozen)


MAX_PINNED_BYTES = 2**29
"""Largest snapshot of a GPU's tensors that is pinned: it is never swapped, and rounded up."""


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous copies on the CPU. A GPU copies them without waiting for each, if they are pinned."""
    on_gpu = [tensor for tensor in tensors.values() if tensor.is_cuda]
    pins = bool(on_gpu) and sum(tensor.nbytes for tensor in on_gpu) <= MAX_PINNED_BYTES
    copies = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pins)
        for name, tensor in tensors.items()
    }
    for name, tensor in tensors.items():
        copies[name].copy_(tensor.detach(), non_blocking=pins)
    if pins:
        torch.cuda.synchronize(on_gpu[0].device)
    return copies


def network_tensors(network: nn.Module, prefix: str, without: Collection[str] = ()) -> dict[str, Tensor]:
    """Return a network's state with prefixed names; a shared tensor appears under its first name only."""
    seen: set[tuple[int, torch.Size]] = set()
    unique = {}
    for name, tensor in network.state_dict().items():
        identity = (tensor.data_ptr(), tensor.shape)
        if name in without or (tensor.numel() and identity in seen):
            continue
        seen.add(identity)
        unique[f"{prefix}{name}"] = tensor
    return unique


def restore_network(
    network: nn.Module, tensors: Mapping[str, Tensor], prefix: str, without: Collection[str] = ()
) -> None:
    """Load prefixed tensors into a network; a shared tensor needs only one of its names.

    Raises:
        DataError: tensors are missing or have another shape.
    """
    own = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    expected = {name[len(prefix) :]: t.shape for name, t in network_tensors(network, prefix, without).items()}
    unlike = [name for name, shape in expected.items() if name not in own or own[name].shape != shape]
    if unlike:
        missing = count(len(unlike), "tensor is missing or has", "tensors are missing or have")
        found = f"{missing} another shape, such as {sorted(unlike)[0]}"
        raise DataError("resuming from a checkpoint", found, "Start a new run with another --output.")
    network.load_state_dict(own, strict=False)


def optimizer_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's tensors under the names of their parameters."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {
        f"optimizer.{names[id(parameter)]}:{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(
    network: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Load what :func:`optimizer_tensors` returned; all other optimizer state is dropped.

    Each tensor gets the memory layout of its parameter. The fused optimizers of a GPU refuse any other, and
    those of a CPU would give wrong weights.
    """
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = optimizer.state_dict() | {"state": {}}
    for index, parameter in enumerate(ordered):
        prefix = f"optimizer.{names[id(parameter)]}:"
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if own:
            state["state"][index] = {key: _copy_like(parameter, value) for key, value in own.items()}
    optimizer.load_state_dict(state)


def _copy_like(parameter: Tensor, value: Tensor) -> Tensor:
    """Return a copy, since optimizers change their tensors in place; in the parameter's memory layout."""
    if value.shape != parameter.shape:  # such as the number of steps
        return value.clone()
    return torch.empty_like(parameter).copy_(value)


# --- Counters, snapshots and checkpoints ---


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
"""The columns of ``history.csv``, and the keys of a row of :attr:`Progress.history`, where each image has one
class; other labels have another score than the accuracy in its place."""
_SCALER = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
"""The keys of the state of float16's loss scaler."""


@dataclass
class Progress:
    """The counters of a training. All values are plain JSON.

    Attributes:
        epoch: current epoch, from 0.
        batch: next batch of that epoch, from 0.
        steps_per_epoch: batches of an epoch; a checkpoint inside an epoch is valid only if this is unchanged.
        step: batches so far; the lr schedule and the random numbers of a step depend on it.
        lr: the head's learning rate in the last step.
        loss_sum: sum of the loss over the images of the epoch so far.
        num_seen: images of the epoch so far that were trained on.
        epoch_seconds: training time of the epoch so far.
        wait_seconds: part of ``epoch_seconds`` spent waiting for data.
        best: validation metrics of the best epoch.
        best_epoch: best epoch, from 0; -1 before the first epoch has ended.
        bad_epochs: epochs since the best one, for early stopping.
        plateau_factor: factor of the plateau schedule.
        plateau_bad_epochs: epochs without improvement that the plateau schedule counts.
        history: one row per epoch.
        scaler: state of float16's loss scaler.
        skipped: steps that were skipped because of a non-finite loss or gradient.
        skipped_in_row: steps skipped since the last successful one.
        rollbacks: returns to the start of an epoch.
        rate_factor: factor of every learning rate; halved by each rollback.
        microbatch: images in one forward pass; 0 is the whole batch.
        lost: reason for each training image that can no longer be read, by path.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    steps_per_epoch: int = 0
    lr: float = 0.0
    loss_sum: float = 0.0
    num_seen: int = 0
    epoch_seconds: float = 0.0
    wait_seconds: float = 0.0
    best: dict[str, float] = field(default_factory=dict)
    best_epoch: int = -1
    bad_epochs: int = 0
    plateau_factor: float = 1.0
    plateau_bad_epochs: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    scaler: dict[str, Any] = field(default_factory=dict)
    skipped: int = 0
    skipped_in_row: int = 0
    rollbacks: int = 0
    rate_factor: float = 1.0
    microbatch: int = 0
    lost: dict[str, str] = field(default_factory=dict)

    def copy(self) -> Progress:
        """Return a deep copy."""
        return deepcopy(self)

    def to_json(self) -> str:
        """Return one line of JSON; :meth:`from_json` reads back the same floats."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Progress:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: it is not JSON, has unknown keys because another version wrote it, or a value that no
                training has.
        """
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("its progress is not a JSON object")
        unknown = sorted(content.keys() - {key.name for key in fields(cls)})
        if unknown:
            raise ValueError(
                f"it has unknown keys ({', '.join(unknown)}); another version of finetune wrote it"
            )
        progress = cls(**content)
        if odd := next(progress._odd_values(), ""):
            raise ValueError(f"its value of {odd} is not one of a training")
        return progress

    def _odd_values(self) -> Iterator[str]:
        """Yield the names of values that no training has."""
        for key in fields(self):
            value, default = getattr(self, key.name), key.default
            if isinstance(default, int | float):
                is_kind = _is_number(value) and (isinstance(default, float) or type(value) is int)
                if not is_kind or value < min(default, 0):
                    yield key.name
                    return
        has_best = self.best_epoch >= 0
        if self.best_epoch > self.epoch or (self.epoch and not has_best):
            yield "best_epoch"
        score = next((name for name in SCORES if name in self.best), SCORES[0])
        if not _has_numbers(self.best, (score, "loss") if has_best else ()):
            yield "best"
        columns = [name.replace(SCORES[0], score) for name in HISTORY_COLUMNS]
        if not isinstance(self.history, list) or not all(_has_numbers(row, columns) for row in self.history):
            yield "history"
        if self.scaler != {} and not _has_numbers(self.scaler, _SCALER):
            yield "scaler"
        if not isinstance(self.lost, dict) or not all(isinstance(why, str) for why in self.lost.values()):
            yield "lost"


def find_score(row: Mapping[str, float]) -> str:
    """Return the name of the score that a row of the history has: ``accuracy``, or that of other labels."""
    return next(name for name in SCORES if f"eval_{name}" in row)


def _is_number(value: Any) -> bool:
    """Return whether a value is a finite float, or a count that a float holds exactly."""
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < 2**53)


def _has_numbers(values: Any, keys: Collection[str]) -> bool:
    """Return whether a value is a mapping of these keys, in their order, to finite numbers."""
    return isinstance(values, dict) and list(values) == list(keys) and all(map(_is_number, values.values()))


@dataclass(frozen=True)
class Snapshot:
    """A state that training can return to: private copies of the tensors on the CPU, and the counters."""

    tensors: Mapping[str, Tensor]
    progress: Progress

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names start with a prefix, with the prefix removed."""
        return {k.removeprefix(prefix): tensor for k, tensor in self.tensors.items() if k.startswith(prefix)}


@dataclass(frozen=True)
class Checkpoint:
    """Everything that resuming needs.

    Attributes:
        now: current state.
        epoch_start: state at the start of the epoch, for a rollback; it is ``now`` between two epochs.
        best: weights of the best epoch; None before the first epoch has ended.
    """

    now: Snapshot
    epoch_start: Snapshot
    best: Snapshot | None


def find_misfit(
    checkpoint: Checkpoint, network: nn.Module, frozen: Collection[str], has_average: bool
) -> str:
    """Return why a training of a network cannot resume from a checkpoint; "" if it can.

    Args:
        checkpoint: the checkpoint.
        network: network that would be trained.
        frozen: names of its tensors that would never change.
        has_average: whether a moving average of its weights would be kept.
    """
    expected = _forms(network_tensors(network, "", frozen))
    snapshots = [checkpoint.now, checkpoint.epoch_start, *([checkpoint.best] if checkpoint.best else [])]
    for snapshot in snapshots:
        kept = _forms(snapshot.under("model."))
        if unlike := sorted(name for name in expected.keys() & kept.keys() if expected[name] != kept[name]):
            name = unlike[0]
            shown = f"{name} is {kept[name]}, and {expected[name]} in this network"
            return f"tensors of its checkpoint have another shape ({len(unlike)}): {shown}"
        if missing := sorted(expected.keys() - kept.keys()):
            return f"tensors that would now be trained were not before ({len(missing)}), such as {missing[0]}"
        if extra := sorted(kept.keys() - expected.keys()):
            return f"tensors that were trained would not be now ({len(extra)}), such as {extra[0]}"
        if broken := _find_broken(network, snapshot):
            return f"tensors of its checkpoint hold nan or infinity ({len(broken)}), such as {broken[0]}"
    for snapshot in snapshots[:2]:
        if has_average and _forms(snapshot.under("ema.")) != expected:
            return "its checkpoint holds no moving average of the weights (training.ema_decay)"
    return ""


def _forms(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return type and shape of each tensor, such as ``float32 (64, 3)``."""
    return {
        name: f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
    }


def _find_broken(network: nn.Module, snapshot: Snapshot) -> list[str]:
    """Return the weights that are not finite; no checkpoint is written of such ones."""
    names = {name for name, _ in network.named_parameters()}
    kept = [(name, tensor) for one in ("model.", "ema.") for name, tensor in snapshot.under(one).items()]
    return [name for name, tensor in kept if name in names and not tensor.isfinite().all()]


# --- Checks for finite values ---


def compute_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the norm of the whole gradient, on its device; infinite if the squares overflow."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients)


def is_finite(*numbers: Tensor) -> bool:
    """Return whether all scalars are finite, with a single transfer from their device."""
    return bool(reduce(and_, (torch.isfinite(number.detach()) for number in numbers)))


def add_up(tensors: list[Tensor]) -> Tensor:
    """Return the sum of tensors: non-finite if any value is, and cheaper than a maximum."""
    return torch.stack([tensor.detach().sum() for tensor in tensors]).sum()
