"""RunFolder: the one place that knows what the files of a run are called."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune.errors import FinetuneError
from finetune.runs.files import write_json

State = Literal["running", "done", "interrupted", "failed"]


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
        """Which image was trained on and which was judged: ``path,label,split``."""
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
    def history(self) -> Path:
        """One row an epoch."""
        return self.path / "history.csv"

    @property
    def metrics(self) -> Path:
        """The final figures."""
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
    def last_checkpoint(self) -> Path:
        """Everything needed to go on."""
        return self.path / "checkpoints" / "last.safetensors"

    @property
    def best_checkpoint(self) -> Path:
        """Weights of the best epoch so far."""
        return self.path / "checkpoints" / "best.safetensors"

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

    def read_outcome(self) -> Mapping[str, Any]:
        """Return the outcome, empty when there is none that can be read."""
        try:
            content = json.loads(self.outcome.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}

    def write_outcome(self, state: State, message: str, hint: str = "", exit_code: int = 0) -> None:
        """Record how the run stands or ended."""
        write_json(self.outcome, {"state": state, "message": message, "hint": hint, "exit_code": exit_code})


def outcome_of(error: FinetuneError) -> tuple[State, str, str, int]:
    """Return what :meth:`RunFolder.write_outcome` takes for an error."""
    state: State = "interrupted" if error.exit_code == 75 else "failed"
    return state, error.message, error.fix, int(error.exit_code)
