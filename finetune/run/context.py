"""One attempt at a run: what it works with, and how long its phases take."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from finetune.data.dataset import Dataset
from finetune.run.changes import RunChanges
from finetune.run.setup import Ready
from finetune.runs.claim import Claim
from finetune.runs.folder import RunFolder
from finetune.system.display import Display
from finetune.system.distributed import SINGLE_PROCESS, Distributed
from finetune.system.signals import StopSignal
from finetune.tracking.trackers import Trackers
from finetune.training.reporting import Listener


@dataclass
class Clock:
    """Seconds by phase, from a clock that never jumps."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block under a name."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - began, 3)


@dataclass(frozen=True)
class Job:
    """Everything that one attempt at a run works with."""

    ready: Ready
    claim: Claim
    comparison: RunChanges
    allow_changed: bool
    display: Display
    clock: Clock
    stop: StopSignal
    trackers: Trackers
    distributed: Distributed = SINGLE_PROCESS

    @property
    def folder(self) -> RunFolder:
        """The run's."""
        return self.claim.folder


@dataclass(frozen=True)
class Work:
    """What every process of a run needs to fit its network.

    Attributes:
        ready: with the network on its device.
        dataset: the usable images.
        digests: sha256 of each.
        changed: something is otherwise than it was in an earlier attempt, and allowed to be.
        claim: on the run folder, where only the main process writes.
        display: what the user sees.
        clock: of the phases.
        stop: what asks this process to stop.
        on_history: told the rows of the history.
        distributed: the processes.
    """

    ready: Ready
    dataset: Dataset
    digests: Mapping[str, str]
    changed: bool
    claim: Claim
    display: Display
    clock: Clock
    stop: StopSignal
    on_history: Listener = lambda _: None
    distributed: Distributed = SINGLE_PROCESS

    @property
    def folder(self) -> RunFolder:
        """The run's."""
        return self.claim.folder
