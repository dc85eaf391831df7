"""One row an epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from finetune.runs.files import write_csv
from finetune.training.progress import Progress

Listener = Callable[[Sequence[Mapping[str, float]]], None]
"""Told all rows whenever there is a new one, and when training goes on."""

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


def add_row(progress: Progress, figures: Mapping[str, float], loss_sum: float) -> dict[str, float]:
    """Add the epoch that has just been judged to the history, and return its row."""
    seconds = max(progress.epoch_seconds, 1e-9)
    row = {
        "epoch": progress.epoch + 1,
        "lr": progress.lr,
        "train_loss": loss_sum / max(progress.num_seen, 1),
        "eval_loss": figures["loss"],
        "eval_accuracy": figures["accuracy"],
        "seconds": round(seconds, 3),
        "images_per_second": round(progress.num_seen / seconds, 2),
        "data_wait_fraction": round(progress.wait_seconds / seconds, 4),
    }
    progress.history.append(row)
    return row


def write_history(path: Path, progress: Progress, listener: Listener) -> None:
    """Write all rows, over what a killed process may have written further, and tell them."""
    write_csv(path, [tuple(row.values()) for row in progress.history], HISTORY_COLUMNS)
    listener(progress.history)
