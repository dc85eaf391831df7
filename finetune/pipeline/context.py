"""One attempt at a run: its inputs, and the time of its phases."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from finetune.data.dataset import SPLITS, PreparedDataset, Split
from finetune.pipeline.setup import RunSetup
from finetune.runs.claim import Claim
from finetune.runs.folder import RunFolder
from finetune.system.display import Display
from finetune.system.distributed import SINGLE_PROCESS, Distributed
from finetune.system.signals import StopSignal
from finetune.training.reporting import Listener


@dataclass
class Clock:
    """Seconds spent in each phase, from a monotonic clock."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the duration of the block to a phase."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - began, 3)


@dataclass(frozen=True)
class FitContext:
    """One running attempt at a run; every rank holds the same.

    Attributes:
        setup: decisions from before the start; the network is on its device.
        dataset: usable images.
        claim: claim on the run folder, where only rank 0 writes.
        display: progress display; silent on all ranks but rank 0.
        changed: whether the data or the recipe changed since the last attempt, and the user allowed it.
        clock: clock of the phases.
        stop: records signals that ask this process to stop.
        on_history: called with the rows of the history, on rank 0.
        distributed: ranks of the run.
    """

    setup: RunSetup
    dataset: PreparedDataset
    claim: Claim
    display: Display
    changed: bool = False
    clock: Clock = field(default_factory=Clock)
    stop: StopSignal = field(default_factory=StopSignal)
    on_history: Listener = lambda _: None
    distributed: Distributed = SINGLE_PROCESS

    @property
    def folder(self) -> RunFolder:
        """The folder of the run."""
        return self.claim.folder

    @property
    def splits(self) -> list[Split]:
        """The splits that have images."""
        return [split for split in SPLITS if self.dataset.of(split)]
