"""After each epoch: is it the best one, what does the plateau say, is patience over?"""

from __future__ import annotations

from collections.abc import Mapping

from finetune.recipe import TrainingSettings
from finetune.training.progress import Progress
from finetune.training.schedule import Plateau


def is_better(figures: Mapping[str, float], best: Mapping[str, float], monitor: str) -> bool:
    """Higher accuracy, a lower loss among equals; or the lower loss alone."""
    if not best:
        return True
    if monitor == "loss":
        return figures["loss"] < best["loss"]
    return (figures["accuracy"], -figures["loss"]) > (best["accuracy"], -best["loss"])


def observe(progress: Progress, figures: dict[str, float], settings: TrainingSettings) -> bool:
    """Take note of an epoch's validation figures, and return whether it is the best so far."""
    improved = is_better(figures, progress.best, settings.monitor)
    progress.bad_epochs = 0 if improved else progress.bad_epochs + 1
    if improved:
        progress.best, progress.best_epoch = figures, progress.epoch
    if settings.schedule == "plateau":
        plateau = Plateau(
            settings.decay_epochs, settings.decay_rate, progress.plateau_factor, progress.plateau_bad_epochs
        )
        plateau.observe(improved)
        progress.plateau_factor, progress.plateau_bad_epochs = plateau.factor, plateau.bad_epochs
    return improved


def is_over(progress: Progress, settings: TrainingSettings) -> bool:
    """Return whether all epochs are trained, or patience is at its end."""
    out_of_patience = settings.patience is not None and progress.bad_epochs >= settings.patience
    return progress.epoch >= settings.epochs or out_of_patience
