"""Learning rates as a function of the step.

timm's schedulers are not used here: their warm-up start and their floor are absolute rates shared by
all groups, which would undo the 1 : 1/10 : 1/100 between groups while they act. One factor for all
groups keeps the proportions at every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune.recipe import TrainingSettings


@dataclass(frozen=True)
class Schedule:
    """The factor that multiplies every group's base rate.

    Attributes:
        kind: constant, cosine, step or plateau.
        epochs: in the whole run.
        warmup_epochs: of linear growth from nearly zero.
        decay_epochs: of the step schedule.
        decay_rate: of the step schedule.
    """

    kind: str
    epochs: int
    warmup_epochs: float
    decay_epochs: int
    decay_rate: float

    @classmethod
    def from_settings(cls, settings: TrainingSettings) -> Schedule:
        """Read it off a recipe's section."""
        return cls(
            settings.schedule,
            settings.epochs,
            min(settings.warmup_epochs, settings.epochs),
            settings.decay_epochs,
            settings.decay_rate,
        )

    def factor(self, step: int, steps_per_epoch: int) -> float:
        """Return the factor of a step, counted from 0, in (0, 1]. The plateau's own factor comes on top."""
        warmup_steps = round(self.warmup_epochs * steps_per_epoch)
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if self.kind == "cosine":
            total = max(1, self.epochs * steps_per_epoch - warmup_steps)
            return (1 + math.cos(math.pi * (step - warmup_steps) / total)) / 2
        if self.kind == "step":
            return self.decay_rate ** (step // steps_per_epoch // self.decay_epochs)
        return 1.0


@dataclass
class Plateau:
    """Multiplies by ``rate`` after ``patience`` epochs without improvement.

    Attributes:
        factor: product of the decays so far.
        bad_epochs: since the best one or the last decay.
    """

    patience: int
    rate: float
    factor: float = 1.0
    bad_epochs: int = 0

    def observe(self, improved: bool) -> None:
        """Take note of an epoch."""
        self.bad_epochs = 0 if improved else self.bad_epochs + 1
        if self.bad_epochs >= self.patience:
            self.factor *= self.rate
            self.bad_epochs = 0
