"""The contract between a job and the platform that starts it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune.errors import DiskError, FinetuneError, UsageError
from finetune.runs.files import write_text

LONGEST_FAILURE = 1024
"""Characters of a failure that SageMaker shows."""


@dataclass(frozen=True)
class Platform:
    """Where a platform wants things, and what it says in place of a command line.

    Attributes:
        name: for people.
        hyperparameters: settings, called like flags (``batch_size``) or keys of the recipe (``training.lr``).
        output: run folder that outlives the machine.
        model: folder that the finished model is copied to.
        results: folder that figures and report are copied to; None where the run folder is kept.
        boards: folder that TensorBoard's files are copied to.
        failure: file that says why a job failed.
        machines: of the job, each of which runs the same command.
        warning: about all this, in a sentence.
    """

    name: str
    output: Path
    hyperparameters: Mapping[str, str] = field(default_factory=dict)
    model: Path | None = None
    results: Path | None = None
    boards: Path | None = None
    failure: Path | None = None
    machines: Sequence[str] = ()
    warning: str = ""

    def find_data(self) -> Path | None:
        """Return where the platform has put the images; None where it leaves that to the user.

        Raises:
            UsageError: it cannot be told.
        """
        return None

    def settle(self) -> Platform:
        """Return the contract for a run whose folder the platform chooses, after a look at that place."""
        return self

    def check_writable(self) -> None:
        """Refuse before the training what would fail after it.

        Raises:
            DiskError: a folder that results are copied to cannot be written.
        """
        for folder in (self.model, self.results, self.boards):
            if folder is None:
                continue
            above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
            if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
                fix = "Let the image run as a user who may (docs/platforms.md says how)."
                found = f"user {os.getuid()} may not write there"
                raise DiskError(f"{folder}, where {self.name} looks for results", found, fix)

    def write_failure(self, message: str, fix: str = "") -> None:
        """Leave the reason of a failure where the platform looks for it; a long one loses its middle."""
        if self.failure is None or not is_main():
            return
        room = LONGEST_FAILURE - len(fix) - 2
        if len(message) > room > 5:
            message = f"{message[: room // 2 - 3]} ... {message[-(room // 2 - 3) :]}"
        with suppress(OSError, FinetuneError):  # the exit code says that it failed
            self.failure.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.failure, f"{message}\n{fix}\n"[:LONGEST_FAILURE])

    def clear_failure(self) -> None:
        """Take back a failure that was overcome."""
        if self.failure is not None and is_main():
            with suppress(OSError):
                self.failure.unlink(missing_ok=True)


def is_main() -> bool:
    """Return whether this process speaks for all that a launcher may have started."""
    return os.environ.get("RANK", "0") == "0"


# --- Amazon SageMaker training jobs: ``docker run IMAGE train``, the rest in files below /opt/ml ---
#
# =========================================  =================================================================
# ``input/config/hyperparameters.json``      flags and keys of the recipe, as text
# ``input/config/inputdataconfig.json``      the names of the channels
# ``input/config/resourceconfig.json``       the hosts
# ``input/data/<channel>/``                  images
# ``checkpoints/``                           kept in S3 while the job runs, and brought back when it starts
# ``model/``                                 becomes model.tar.gz
# ``output/data/``                           becomes output.tar.gz
# ``output/failure``                         the reason of a failure, of which 1,024 characters are shown
# =========================================  =================================================================
#
# Source: the developer guide, "Use your own training algorithms", and aws/sagemaker-training-toolkit.


BASE = "SAGEMAKER_BASE_DIR"
"""Environment variable of SageMaker's own toolkit, in place of /opt/ml."""
PARTS = ("train", "val", "valid", "validation", "test")
"""Channels that are parts of the data, in the words of finetune.data."""
_NOT_OURS = ("sagemaker_", "_tuning")
"""Hyperparameters that SageMaker's Python SDK and its tuner add for themselves."""
_AGAIN = "The platform writes it: start the job anew."


@dataclass(frozen=True)
class SageMaker(Platform):
    """A training job.

    Attributes:
        base: ``/opt/ml``.
    """

    base: Path = Path("/opt/ml")

    def find_data(self) -> Path | None:
        """Return the only channel, or the folder whose train and validation are channels.

        Raises:
            UsageError: it cannot be told which channels hold the images, or one is a pipe.
        """
        channels = _read(self.base, "inputdataconfig.json")
        for name, settings in channels.items():
            if isinstance(settings, dict) and settings.get("TrainingInputMode") == "Pipe":
                fix = "Take the input mode File or FastFile."
                raise UsageError(f"channel {name}", "a pipe cannot be read in another order", fix)
        folder = self.base / "input" / "data"
        parts = sorted(name for name in channels if name.lower() in PARTS)
        candidates = parts or sorted(channels)
        if len(candidates) == 1:
            return folder / candidates[0]
        if len(parts) > 1:
            return folder
        if not channels:
            return None
        found = "it cannot be told which of them hold the images"
        fix = f"Call them train, validation and test, or set the hyperparameter data to {folder}/<channel>."
        raise UsageError(f"channels {', '.join(candidates)}", found, fix)


def find_sagemaker() -> SageMaker | None:
    """Return the training job that this process is; None where there is none.

    Raises:
        UsageError: a file of the platform cannot be understood.
    """
    base = Path(os.environ.get(BASE) or "/opt/ml")
    if not (base / "input" / "config" / "resourceconfig.json").is_file():
        return None
    results = base / "output" / "data"
    kept = base / "checkpoints"
    hosts = _read(base, "resourceconfig.json").get("hosts", [])
    return SageMaker(
        "SageMaker",
        output=(kept if kept.is_dir() else results) / "run",
        hyperparameters=_read_hyperparameters(base),
        model=base / "model",
        results=results if kept.is_dir() else None,
        failure=base / "output" / "failure",
        machines=[str(host) for host in hosts] if isinstance(hosts, list) else [],
        base=base,
    )


def _read_hyperparameters(base: Path) -> dict[str, str]:
    """Return the job's own. Parts of SageMaker's SDK write JSON into the text, others plain words."""
    given = _read(base, "hyperparameters.json")
    return {name: _plain(value) for name, value in given.items() if not name.startswith(_NOT_OURS)}


def _plain(value: Any) -> str:
    if not isinstance(value, str):
        return json.dumps(value)
    try:
        inner = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return inner if isinstance(inner, str) else value


def _read(base: Path, name: str) -> dict[str, Any]:
    path = base / "input" / "config" / name
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        found = f"it cannot be read ({' '.join(str(error).split())[:200]})"
        raise UsageError(str(path), found, _AGAIN) from None
    if not isinstance(content, dict):
        raise UsageError(str(path), "it holds no names and values", _AGAIN)
    return content


# --- Vertex AI custom jobs: folders are named in AIP_* variables, and buckets are mounted below /gcs ---
#
# ``AIP_CHECKPOINT_DIR``, ``AIP_MODEL_DIR`` and ``AIP_TENSORBOARD_LOG_DIR`` are set where the job has a base
# output directory. ``CLUSTER_SPEC`` names the replicas.
#
# Source: Vertex AI, "Prepare training code" and the reference of CustomJobSpec.


MOUNT = Path("/gcs")
_SIGNS = ("CLOUD_ML_JOB_ID", "AIP_MODEL_DIR", "AIP_CHECKPOINT_DIR")


@dataclass(frozen=True)
class Vertex(Platform):
    """A custom job."""

    def settle(self) -> Platform:
        """Return the contract with the run on this machine where the bucket cannot hold it.

        A checkpoint counts as soon as its folder is renamed, whole or not at all; many buckets cannot do so.
        """
        if not self.output.is_absolute() or can_rename_folders(self.output.parent):
            return self
        local = _local_output()
        warning = (
            f"{self.output.parent} cannot rename folders, so the run is kept in {local}: a job that is "
            f"started again begins anew; figures and report are copied to {self.output} at the end"
        )
        return replace(self, output=local, results=self.output, warning=warning)


def find_vertex(mount: Path = MOUNT) -> Vertex | None:
    """Return the custom job that this process is; None where there is none.

    Args:
        mount: where buckets are folders.

    Raises:
        UsageError: CLUSTER_SPEC cannot be understood.
    """
    if not any(os.environ.get(name) for name in _SIGNS):
        return None
    kept = _folder("AIP_CHECKPOINT_DIR", mount)
    return Vertex(
        "Vertex AI",
        output=(kept.absolute() / "run") if kept else _local_output(),
        model=_folder("AIP_MODEL_DIR", mount),
        boards=_folder("AIP_TENSORBOARD_LOG_DIR", mount),
        machines=_machines(),
    )


def _local_output() -> Path:
    return Path("runs") / (os.environ.get("CLOUD_ML_JOB_ID") or "job")


def _folder(variable: str, mount: Path) -> Path | None:
    address = os.environ.get(variable, "")
    if not address:
        return None
    scheme, separator, rest = address.partition("://")
    return mount / rest if separator and scheme == "gs" else Path(address)


def can_rename_folders(folder: Path) -> bool:
    """Return whether a folder with a file in it can be renamed here, as buckets often cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(".part", ".", folder, ignore_cleanup_errors=True) as name:
            before, after = Path(name) / "before", Path(name) / "after"
            before.mkdir()
            (before / "file").write_text("x", encoding="utf-8")
            return (before.rename(after) / "file").exists()
    except OSError:
        return False


def _machines() -> list[str]:
    """Return the replicas that train: the primary one, and those of the second pool."""
    text = os.environ.get("CLUSTER_SPEC") or "{}"
    try:
        pools = json.loads(text).get("cluster", {})
        return [str(replica) for pool in ("workerpool0", "workerpool1") for replica in pools.get(pool, [])]
    except (ValueError, TypeError, AttributeError, RecursionError):
        found = "it does not say which machines there are"
        fix = "Vertex AI sets it: leave it alone, or unset it elsewhere."
        raise UsageError(f"CLUSTER_SPEC={text[:200]}", found, fix) from None


# --- What a managed platform tells a job that it starts, and what it wants to find when the job has ended ---
#
# A platform is found by what it leaves for the job, environment variables and files; where there is none,
# nothing here does anything.


__all__ = ["Platform", "find_platform", "find_sagemaker", "find_vertex", "write_failure"]


def find_platform() -> Platform | None:
    """Return the platform that has started this process; None where none is known.

    Raises:
        UsageError: what it says cannot be understood.
    """
    return find_sagemaker() or find_vertex()


def write_failure(message: str, fix: str) -> None:
    """Leave the reason of a failure where a platform looks for it, if there is one."""
    with suppress(FinetuneError):
        if (platform := find_platform()) is not None:
            platform.write_failure(message, fix)
