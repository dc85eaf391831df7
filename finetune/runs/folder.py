"""RunFolder: the names of the files of a run. No other module spells them."""

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
"""Exit codes after which the same command may succeed: by chance, after space was freed, or at any time."""


@dataclass(frozen=True)
class Outcome:
    """The state of a run, for people and for programs that restart it.

    Attributes:
        state: running, done, interrupted or failed.
        message: what happened.
        hint: what to do about it.
        exit_code: exit code of the process.
        fault: name of the kind of failure; empty while the run is running and after it is done.
        retryable: whether the same command may succeed.
        step: training step that was reached.
        attempt: number of processes that have worked on the run, this one included.
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
        """Return the outcome of a run that an error has ended."""
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
        """Return the content of ``outcome.json``; its ``class`` is the fault, or null."""
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
    """Paths in a run folder. Reading a property creates nothing."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe; ``finetune run --recipe`` repeats the run with it."""
        return self.path / "recipe.yaml"

    @property
    def environment(self) -> Path:
        """Versions and hardware."""
        return self.path / "environment.json"

    @property
    def classes(self) -> Path:
        """One class name per line, in index order."""
        return self.path / "classes.txt"

    @property
    def split(self) -> Path:
        """Label, split and digest of every image: ``path,label,split,sha256``."""
        return self.path / "split.csv"

    @property
    def bad_images(self) -> Path:
        """Images that could not be read: ``path,split,reason``."""
        return self.path / "bad_images.csv"

    @property
    def plan(self) -> Path:
        """Which stages are trained, with which learning rate, one row per stage."""
        return self.path / "plan.csv"

    @property
    def advice(self) -> Path:
        """Why ``--strategy auto`` chose what it chose."""
        return self.path / "advice.json"

    @property
    def budget(self) -> Path:
        """What ``--budget`` tried, what it chose, and what that is worth."""
        return self.path / "budget.json"

    @property
    def budget_table(self) -> Path:
        """The candidates of ``--budget``, one row each."""
        return self.path / "budget.csv"

    @property
    def best_recipe(self) -> Path:
        """The recipe of the best candidate of ``--budget`` so far."""
        return self.path / "best.yaml"

    @property
    def trunk(self) -> Path:
        """Where the network is cut, so that its frozen trunk runs once."""
        return self.path / "trunk.json"

    @property
    def history(self) -> Path:
        """Metrics of training, one row per epoch."""
        return self.path / "history.csv"

    @property
    def forgotten(self) -> Path:
        """Scores on old classes, of the run that ``finetune extend`` was given and of this one."""
        return self.path / "forgotten.csv"

    @property
    def metrics(self) -> Path:
        """The final metrics."""
        return self.path / "metrics.json"

    @property
    def predictions(self) -> Path:
        """One row per evaluated image: ``path,label,predicted,confidence,prob_<class>...``."""
        return self.path / "predictions.csv"

    @property
    def confusion_matrix(self) -> Path:
        """Counts: one row per true class, one column per predicted class."""
        return self.path / "confusion_matrix.csv"

    @property
    def cooccurrence(self) -> Path:
        """Images that have both of two classes: one row and one column per class of several."""
        return self.path / "cooccurrence.csv"

    @property
    def per_class(self) -> Path:
        """Precision, recall, F1 and support, one row per class."""
        return self.path / "per_class.csv"

    @property
    def check(self) -> Path:
        """The issues that the check of the data found."""
        return self.path / "check.json"

    @property
    def check_sheet(self) -> Path:
        """Images of the issues, as one picture; `finetune check` writes it."""
        return self.path / "check.png"

    @property
    def report(self) -> Path:
        """The report: metrics, plots and images on one page."""
        return self.path / "report.html"

    @property
    def plots(self) -> Path:
        """The plots of the report, each as a file."""
        return self.path / "plots"

    @property
    def tracking(self) -> Path:
        """Files of experiment trackers."""
        return self.path / "tracking"

    @property
    def checkpoints(self) -> Path:
        """Everything needed to resume, in folders (:mod:`finetune.training.checkpoint`)."""
        return self.path / "checkpoints"

    @property
    def epochs(self) -> Path:
        """Weights after the epochs of ``training.keep_epochs``, each in a file of its own."""
        return self.path / "epochs"

    def epoch(self, number: int) -> Path:
        """The trained weights after an epoch, counted from 1."""
        return self.epochs / f"epoch-{number:06}.safetensors"

    @property
    def diverged(self) -> Path:
        """The batch on which training diverged, and the weights at that step."""
        return self.path / "diverged.safetensors"

    @property
    def model(self) -> Path:
        """The finished model, as a folder that can be deployed on its own."""
        return self.path / "model"

    @property
    def log(self) -> Path:
        """All messages of the run."""
        return self.path / "run.log"

    @property
    def progress(self) -> Path:
        """How far the run is, for programs that watch it."""
        return self.path / "progress.json"

    @property
    def outcome(self) -> Path:
        """The state of the run, or how it ended."""
        return self.path / "outcome.json"

    def write_trunk(self, content: Mapping[str, Any]) -> None:
        """Write how the network is cut: ``cut`` (null: not at all) and ``reason``."""
        write_json(self.trunk, content)

    def write_outcome(self, outcome: Outcome) -> None:
        """Write the state of the run."""
        write_json(self.outcome, outcome.to_dict())


def default_folder(command: str) -> Path:
    """Return ``runs/<time>-<command>``."""
    return Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{command}"
