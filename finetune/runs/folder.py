"""RunFolder: the one place that knows what the files of a run are called."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.errors import ExitCode, FinetuneError
from finetune.runs.files import write_json

State = Literal["running", "done", "interrupted", "failed"]
RETRYABLE = (ExitCode.INTERNAL, ExitCode.DISK, ExitCode.INTERRUPTED)
"""Ends after which the same command may well succeed: by luck once, when there is space, at any time."""


@dataclass(frozen=True)
class Outcome:
    """How a run stands or ended, for people and for what starts it again.

    Attributes:
        state: running, done, interrupted or failed.
        message: what happened.
        hint: what to do about it.
        exit_code: of the process.
        fault: name of the kind of end; empty while the run is going on and when it is done.
        retryable: the same command may well succeed.
        step: of training that was reached.
        attempt: how many processes have worked on the run, this one included.
    """

    state: State
    message: str
    hint: str = ""
    exit_code: int = 0
    fault: str = ""
    retryable: bool = False
    step: int = 0
    attempt: int = 1

    @classmethod
    def of(cls, error: FinetuneError, step: int, attempt: int) -> Outcome:
        """Return the outcome that an error is."""
        code = error.exit_code
        return cls(
            "interrupted" if code == ExitCode.INTERRUPTED else "failed",
            error.message,
            error.fix,
            int(code),
            code.name.lower(),
            code in RETRYABLE,
            step,
            attempt,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what ``outcome.json`` holds; ``class`` is the fault, null where there is none."""
        return {
            "state": self.state,
            "class": self.fault or None,
            "retryable": self.retryable,
            "message": self.message,
            "hint": self.hint,
            "exit_code": self.exit_code,
            "step": self.step,
            "attempt": self.attempt,
        }


@dataclass(frozen=True)
class RunFolder:
    """Paths in a run folder. Nothing is created by asking for a path."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The recipe with every "auto" decided; ``finetune run --recipe`` repeats the run with it."""
        return self.path / "recipe.yaml"

    @property
    def environment(self) -> Path:
        """Versions and hardware."""
        return self.path / "environment.json"

    @property
    def classes(self) -> Path:
        """One class name a line, in index order."""
        return self.path / "classes.txt"

    @property
    def split(self) -> Path:
        """Which image was trained on and which was judged: ``path,label,split,sha256``."""
        return self.path / "split.csv"

    @property
    def bad_images(self) -> Path:
        """Images that could not be read: ``path,split,reason``."""
        return self.path / "bad_images.csv"

    @property
    def plan(self) -> Path:
        """What learns, and how fast, one row a stage."""
        return self.path / "plan.csv"

    @property
    def advice(self) -> Path:
        """Why ``--strategy auto`` chose what it chose."""
        return self.path / "advice.json"

    @property
    def trunk(self) -> Path:
        """Where the network is cut, so that its frozen part runs once."""
        return self.path / "trunk.json"

    @property
    def history(self) -> Path:
        """One row an epoch."""
        return self.path / "history.csv"

    @property
    def metrics(self) -> Path:
        """The final metrics."""
        return self.path / "metrics.json"

    @property
    def predictions(self) -> Path:
        """One row an image of the judged split: ``path,label,predicted,confidence,prob_<class>...``."""
        return self.path / "predictions.csv"

    @property
    def confusion_matrix(self) -> Path:
        """Counts: a row a true class, a column a predicted one."""
        return self.path / "confusion_matrix.csv"

    @property
    def per_class(self) -> Path:
        """Precision, recall, F1 and support, one row a class."""
        return self.path / "per_class.csv"

    @property
    def check(self) -> Path:
        """What the look at the data found."""
        return self.path / "check.json"

    @property
    def report(self) -> Path:
        """Everything that is worth looking at, on one page."""
        return self.path / "report.html"

    @property
    def plots(self) -> Path:
        """The drawings of the page, each as a file."""
        return self.path / "plots"

    @property
    def tracking(self) -> Path:
        """What experiment trackers keep here."""
        return self.path / "tracking"

    @property
    def checkpoints(self) -> Path:
        """Everything needed to go on, in folders (:mod:`finetune.training.checkpoint`)."""
        return self.path / "checkpoints"

    @property
    def diverged(self) -> Path:
        """The batch that ended a training, and the weights it met."""
        return self.path / "diverged.safetensors"

    @property
    def model(self) -> Path:
        """The deployable folder and nothing else."""
        return self.path / "model"

    @property
    def log(self) -> Path:
        """What was said."""
        return self.path / "run.log"

    @property
    def outcome(self) -> Path:
        """How it ended."""
        return self.path / "outcome.json"

    def write_trunk(self, content: Mapping[str, Any]) -> None:
        """Record how the network is cut: ``cut`` (null: not at all) and ``reason``."""
        write_json(self.trunk, content)

    def write_outcome(self, outcome: Outcome) -> None:
        """Record how the run stands or ended."""
        write_json(self.outcome, outcome.to_dict())


def default_folder(command: str) -> Path:
    """Return ``runs/<time>-<command>``."""
    return Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{command}"
