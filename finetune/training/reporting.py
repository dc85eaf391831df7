"""Progress of a training: bars, one line per epoch, and ``history.csv``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from finetune.runs.files import write_csv
from finetune.system.display import Advance, Display
from finetune.system.progress_line import format_time
from finetune.targets import METRIC_NAMES
from finetune.training.state import HISTORY_COLUMNS, Progress, find_score


class ProgressReporter:
    """Reports a training's progress on a display.

    Args:
        display: display to report on.
        num_epochs: epochs of the whole run.
        num_images: training images of one epoch.
    """

    def __init__(self, display: Display, num_epochs: int, num_images: int) -> None:
        self.display, self.num_epochs, self.num_images = display, num_epochs, num_images
        self._began, self._done_before = time.perf_counter(), 0.0

    def begin(self, progress: Progress) -> None:
        """Start the clock for the estimate of the time left; a resumed run starts in the middle."""
        self._began, self._done_before = time.perf_counter(), self._done(progress)
        if progress.step:
            self.display.say(f"resuming at epoch {progress.epoch + 1}, step {progress.step}")

    @contextmanager
    def bar(self, progress: Progress, what: str, total: int, done: int = 0) -> Iterator[Advance]:
        """Show a bar over ``total`` images, of which ``done`` are processed already."""
        name = f"{what}, epoch {progress.epoch + 1}/{self.num_epochs}"
        with self.display.track(name, total) as advance:
            advance(done, "")
            yield advance

    def describe_speed(self, progress: Progress) -> str:
        """Return the time until the run ends, the speed, and the share of time spent waiting for data."""
        seconds, left = max(progress.epoch_seconds, 1e-9), self._seconds_left(progress)
        speed, waiting = progress.num_seen / seconds, progress.wait_seconds / seconds
        place = {"epoch": progress.epoch + 1, "epochs": self.num_epochs, "step": progress.step}
        self.display.report(place | {"run_seconds_left": left})
        return f"run ends in {format_time(left)}, {speed:.0f} images/s, waiting {waiting:.0%}"

    def _done(self, progress: Progress) -> float:
        """Share of the run's training that is done, in [0, 1]."""
        return min((progress.epoch + progress.num_seen / self.num_images) / self.num_epochs, 1.0)

    def _seconds_left(self, progress: Progress) -> float:
        """Return the time until the run ends, at the speed since this process started to train."""
        done = self._done(progress)
        return (time.perf_counter() - self._began) * (1 - done) / max(done - self._done_before, 1e-9)

    def report_epoch(self, row: Mapping[str, float], is_best: bool) -> None:
        """Show a row of the history; a star marks the best epoch so far."""
        self.display.report({"metrics": dict(row)})
        score = find_score(row)
        self.display.say_fields(
            [
                f"epoch {row['epoch']:>3}/{self.num_epochs}",
                f"val {METRIC_NAMES[score]} {row[f'eval_{score}']:.4f} {'*' if is_best else ' '}",
                f"val loss {row['eval_loss']:.4f}",
                f"train loss {row['train_loss']:.4f}",
                f"lr {row['lr']:.2e}",
                f"{row['seconds']:.1f} s",
                f"{row['images_per_second']:.0f} images/s",
                f"waiting {row['data_wait_fraction']:.0%}",
            ]
        )


# --- One row per epoch: history.csv ---


Listener = Callable[[Sequence[Mapping[str, float]]], None]
"""Called with all rows after each epoch, and when training resumes."""


def add_row(progress: Progress, metrics: Mapping[str, float], loss_sum: float) -> dict[str, float]:
    """Add the epoch that was just validated to the history, and return its row."""
    seconds = max(progress.epoch_seconds, 1e-9)
    row = {
        "epoch": progress.epoch + 1,
        "lr": progress.lr,
        "train_loss": loss_sum / max(progress.num_seen, 1),
        "eval_loss": metrics["loss"],
        **{f"eval_{name}": value for name, value in metrics.items() if name != "loss"},
        "seconds": round(seconds, 3),
        "images_per_second": round(progress.num_seen / seconds, 2),
        "data_wait_fraction": round(progress.wait_seconds / seconds, 4),
    }
    progress.history.append(row)
    return row


def write_history(path: Path, progress: Progress, listener: Listener) -> None:
    """Replace ``history.csv`` by all rows of the progress, and call the listener with them."""
    rows = progress.history
    write_csv(path, [tuple(row.values()) for row in rows], tuple(rows[0]) if rows else HISTORY_COLUMNS)
    listener(progress.history)
