"""One attempt at a run: what it works with, and how long its phases take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from finetune.display import Display
from finetune.job.prepare import Ready
from finetune.job.same import Comparison
from finetune.runs.claim import Claim
from finetune.runs.folder import RunFolder
from finetune.stopping import StopSignal
from finetune.tracking.trackers import Trackers


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
    comparison: Comparison
    allow_changed: bool
    display: Display
    clock: Clock
    stop: StopSignal
    trackers: Trackers

    @property
    def folder(self) -> RunFolder:
        """The run's."""
        return self.claim.folder
