"""What learning changes, as named tensors: taken from a network and its optimiser, and given back.

Frozen tensors are left out. They are proved unchanged at the end of every run, so that writing them again
and again would only cost time.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from functools import reduce
from operator import and_
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import DataError


class State:
    """The changing tensors of a training.

    Args:
        network: that learns.
        optimizer: that moves it.
        average: of the network's weights, where one is kept.
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
    def judged(self) -> nn.Module:
        """The network whose figures count: the average where one is kept."""
        return self.network if self.average is None else self.average

    def is_finite(self) -> bool:
        """Return whether every weight is a finite number: an update may overflow, with a finite gradient."""
        networks = [self.network] if self.average is None else [self.network, self.average]
        weights = [weight.detach() for network in networks for weight in network.parameters()]
        return is_finite(add_up([weight for weight in weights if weight.numel()]))

    def take(self) -> dict[str, Tensor]:
        """Return copies of all of them, on the CPU."""
        tensors = network_tensors(self.network, "model.", self.frozen)
        tensors |= optimizer_tensors(self.network, self.optimizer)
        if self.average is not None:
            tensors |= network_tensors(self.average, "ema.", self.frozen)
        return _copies(tensors)

    def give_back(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo everything since :meth:`take`."""
        restore_network(self.network, tensors, "model.", self.frozen)
        restore_optimizer(self.network, self.optimizer, tensors)
        if self.average is not None:
            restore_network(self.average, tensors, "ema.", self.frozen)

    def take_judged(self) -> dict[str, Tensor]:
        """Return copies of the judged weights alone, on the CPU."""
        return _copies(network_tensors(self.judged, "model.", self.frozen))

    def give_back_judged(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo everything in the judged network since :meth:`take_judged`."""
        restore_network(self.judged, tensors, "model.", self.frozen)


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def network_tensors(network: nn.Module, prefix: str, without: Collection[str] = ()) -> dict[str, Tensor]:
    """Return a network's state under a prefix, without second names of shared tensors."""
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
    """Fill a network from tensors under a prefix; shared tensors are filled under one of their names.

    Raises:
        DataError: tensors are missing, or have another shape.
    """
    own = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    expected = {name[len(prefix) :]: t.shape for name, t in network_tensors(network, prefix, without).items()}
    unlike = [name for name, shape in expected.items() if name not in own or own[name].shape != shape]
    if unlike:
        found = f"{len(unlike)} tensors are missing or have another shape, among them {sorted(unlike)[0]}"
        raise DataError("resuming from a checkpoint", found, "Start a new run with another --output.")
    network.load_state_dict(own, strict=False)


def optimizer_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's tensors under the names of their parameters."""
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
    """Give the optimiser back what :func:`optimizer_tensors` returned, and nothing else."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    ordered = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    state = optimizer.state_dict() | {"state": {}}
    for index, name in enumerate(ordered):
        prefix = f"optimizer.{name}:"
        # Copies: the optimiser would take tensors of its own type and device as they are, and move them.
        own = {key[len(prefix) :]: value.clone() for key, value in tensors.items() if key.startswith(prefix)}
        if own:
            state["state"][index] = own
    optimizer.load_state_dict(state)


# --- Where a training stands, as plain JSON, and what a state of it is made of ---


@dataclass
class Progress:
    """Where training stands. Everything in it is plain JSON.

    Attributes:
        epoch: being trained, from 0.
        batch: next one of that epoch.
        steps_per_epoch: batches of an epoch, by which a place is known to mean what it meant.
        step: batches so far; the schedule and the random numbers of a step depend on it.
        lr: the head's rate in the last step.
        loss_sum: of the epoch so far, over images.
        num_seen: images of the epoch so far that were learnt from.
        epoch_seconds: training time of the epoch so far.
        wait_seconds: of it spent waiting for data.
        best: validation figures of the best epoch.
        best_epoch: from 0; -1 before the first.
        bad_epochs: since the best one, for early stopping.
        plateau_factor: of the plateau schedule.
        plateau_bad_epochs: of the plateau schedule.
        history: one row an epoch.
        scaler: state of float16's loss scaler.
        skipped: steps that were not made, since a loss or a gradient was no finite number.
        skipped_in_row: of these, since the last step that was made.
        rollbacks: returns to the start of an epoch.
        rate_factor: of all rates; halved by each return.
        microbatch: images that go through the network at a time; 0 is the whole batch.
        lost: training images that could not be read any more, with the reason.
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
        """Return one of its own."""
        return deepcopy(self)

    def to_json(self) -> str:
        """Return one line that :meth:`from_json` reads back to the same floats."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Progress:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: it is no JSON, or has other keys, as another version of the program writes.
        """
        content = json.loads(text)
        unknown = sorted(content.keys() - {key.name for key in fields(cls)})
        if unknown:
            raise ValueError(f"it holds {', '.join(unknown)}, as another version of finetune writes")
        return cls(**content)


@dataclass(frozen=True)
class Snapshot:
    """A state that training can go back to: tensors on the CPU that nobody else changes, and the place."""

    tensors: Mapping[str, Tensor]
    progress: Progress

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin so, without that beginning."""
        return {k.removeprefix(prefix): tensor for k, tensor in self.tensors.items() if k.startswith(prefix)}


@dataclass(frozen=True)
class Checkpoint:
    """Everything that going on needs.

    Attributes:
        now: the state itself.
        epoch_start: where its epoch began, for a return to there; the same object between two epochs.
        best: the judged weights of the best epoch; None before the first epoch has ended.
    """

    now: Snapshot
    epoch_start: Snapshot
    best: Snapshot | None


# --- Know that a loss and its gradient are finite numbers before the weights move ---


def compute_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the norm of the whole gradient, on its device; infinite as well where squares overflow."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients)


def is_finite(*numbers: Tensor) -> bool:
    """Return whether all of some single numbers are finite: one word from their device."""
    return bool(reduce(and_, (torch.isfinite(number.detach()) for number in numbers)))


def add_up(tensors: list[Tensor]) -> Tensor:
    """Return the sum of tensors: infinite or nan where one of their values is, and cheaper than a maximum."""
    return torch.stack([tensor.detach().sum() for tensor in tensors]).sum()
