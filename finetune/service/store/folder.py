"""StoreFolder: the names of the files of a store. No other module of the service spells them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finetune.runs.folder import RunFolder


@dataclass(frozen=True)
class JobFolder:
    """Paths of a job. Reading a property creates nothing."""

    path: Path

    @property
    def recipe(self) -> Path:
        """What ``finetune run`` is given."""
        return self.path / "recipe.yaml"

    @property
    def run(self) -> RunFolder:
        """The run folder, the same for every attempt."""
        return RunFolder(self.path / "run")

    def log(self, attempt: int) -> Path:
        """All that an attempt wrote to its terminal."""
        return self.path / f"attempt-{attempt:03}.log"


@dataclass(frozen=True)
class StoreFolder:
    """Paths of a store's files. Servers of one store share the folder."""

    path: Path

    def job(self, job: str) -> JobFolder:
        """The folder of a job."""
        return JobFolder(self.path / "jobs" / job)

    def model(self, name: str, version: int) -> Path:
        """The folder of a version of a model."""
        return self.path / "models" / name / f"{version:06}"

    def model_log(self, name: str) -> Path:
        """What the processes of a model print."""
        return self.path / "models" / name / "process.log"

    @property
    def uploads(self) -> Path:
        """Parts of archives that are being uploaded."""
        return self.path / "uploads"

    def dataset(self, dataset: str) -> Path:
        """The folder of a data set, with its archive."""
        return self.path / "datasets" / dataset
