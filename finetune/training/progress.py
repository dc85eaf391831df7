"""Where a training stands, as plain JSON, and what a state of it is made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor


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
