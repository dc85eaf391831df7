"""How often to write a checkpoint: so that a kill costs little, and writing costs less."""

from __future__ import annotations

import time

from finetune.recipe import TrainingSettings
from finetune.training.progress import Snapshot

SHARE = 0.01
"""Most of the training time that writing checkpoints may take."""
LEAST_SECONDS = 60.0
"""Between two checkpoints inside an epoch."""
BYTES_PER_SECOND = 2e8
"""Of writing with its sha256 and fsync, as a guess before the first one is measured."""


def estimate_bytes(snapshot: Snapshot, settings: TrainingSettings) -> int:
    """Return the most bytes of a checkpoint: one inside an epoch, whose optimiser has begun to move."""
    weights = sum(tensor.nbytes for tensor in snapshot.under("model.").values())
    slots = 2 if settings.optimizer == "adamw" else int(settings.momentum > 0)
    state = weights * (1 + slots + (settings.ema_decay is not None))
    return 2 * state + weights  # the state, where its epoch began, and the best epoch


class Pace:
    """Says when a checkpoint is due. Where it falls leaves no trace in the result.

    Args:
        num_bytes: of one checkpoint.
    """

    def __init__(self, num_bytes: int) -> None:
        self._cost = num_bytes / BYTES_PER_SECOND
        self._last = time.perf_counter()

    def is_due(self, inside_epoch: bool) -> bool:
        """Return whether enough time has passed for another one."""
        least = LEAST_SECONDS if inside_epoch else 0.0
        return time.perf_counter() - self._last >= max(self._cost / SHARE, least)

    def wrote(self, seconds: float) -> None:
        """Take note of one that was written just now."""
        self._cost, self._last = seconds, time.perf_counter()
