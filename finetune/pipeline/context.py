"""One attempt at a run: what it works with, and how long its phases take."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from finetune.data.dataset import SPLITS, Dataset, Split
from finetune.pipeline.setup import RunSetup
from finetune.runs.claim import Claim
from finetune.runs.folder import RunFolder
from finetune.system.display import Display
from finetune.system.distributed import SINGLE_PROCESS, Distributed
from finetune.system.signals import StopSignal
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
class FitContext:
    """What is running: one attempt at a run, in every process alike.

    Attributes:
        setup: what was decided before it began; the network is on its device.
        dataset: the usable images, prepared.
        digests: sha256 of each image, by path.
        claim: on the run folder, where only the main process writes.
        display: what the user sees; silent in all but the main process.
        changed: the data or the recipe changed since the last attempt, which the user has allowed.
        clock: measures the phases.
        stop: notes the signals that ask this process to stop.
        on_history: told the rows of the history, in the main process.
        distributed: the processes.
    """

    setup: RunSetup
    dataset: Dataset
    digests: Mapping[str, str]
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
