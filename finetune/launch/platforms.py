"""Managed platforms: where they put data, settings and results, and how a job learns that it runs on one.

A platform is detected by the environment variables and files that it leaves for a job. Elsewhere nothing here
has an effect. Amazon SageMaker and Google Vertex AI are known.
"""

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
from finetune.runs.files import read_object, write_text

LONGEST_FAILURE = 1024
"""Number of characters of a failure message that SageMaker shows."""


@dataclass(frozen=True)
class Platform:
    """The folders of a platform, and the settings that it gives to a job.

    Attributes:
        name: display name.
        output: run folder, on storage that outlives the machine.
        hyperparameters: settings, named like flags (``batch_size``) or recipe keys (``training.lr``).
        model: folder that the finished model is copied to.
        results: folder that metrics and report are copied to; None if the platform keeps the run folder.
        tensorboard: folder that TensorBoard's event files are copied to.
        failure: file that receives the reason of a failure.
        machines: names of the job's machines, each of which runs the same command.
        warning: a sentence to show to the user; empty if there is nothing to warn of.
    """

    name: str
    output: Path
    hyperparameters: Mapping[str, str] = field(default_factory=dict)
    model: Path | None = None
    results: Path | None = None
    tensorboard: Path | None = None
    failure: Path | None = None
    machines: Sequence[str] = ()
    warning: str = ""

    def find_data(self) -> Path | None:
        """Return the folder of the images; None if the platform does not provide any.

        Raises:
            UsageError: the folder is ambiguous.
        """
        return None

    def resolve_output(self) -> Platform:
        """Return the platform with a usable run folder; called if the user has not named one."""
        return self

    def check_writable(self) -> None:
        """Check before training that the results can be copied after it.

        Raises:
            DiskError: a folder that results are copied to is not writable.
        """
        for folder in (self.model, self.results, self.tensorboard):
            if folder is None:
                continue
            above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
            if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
                fix = "Run the image as a user with write permission (see docs/platforms.md)."
                found = f"user {os.getuid()} may not write there"
                raise DiskError(f"{folder}, where {self.name} expects results", found, fix)

    def write_failure(self, message: str, fix: str = "") -> None:
        """Write the reason of a failure to the platform's file; a long message is cut in its middle."""
        if self.failure is None or not is_main_process():
            return
        room = LONGEST_FAILURE - len(fix) - 2
        if len(message) > room > 5:
            message = f"{message[: room // 2 - 3]} ... {message[-(room // 2 - 3) :]}"
        with suppress(OSError, FinetuneError):  # the exit code still tells that the job failed
            self.failure.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.failure, f"{message}\n{fix}\n"[:LONGEST_FAILURE])

    def clear_failure(self) -> None:
        """Remove the reason of an earlier failure after a later attempt has succeeded."""
        if self.failure is not None and is_main_process():
            with suppress(OSError):
                self.failure.unlink(missing_ok=True)


def is_main_process() -> bool:
    """Return whether this is rank 0 or the only process; works without torch."""
    return os.environ.get("RANK", "0") == "0"


# --- Amazon SageMaker training jobs: ``docker run IMAGE train``, and files below /opt/ml ---------
#
# =========================================  =================================================================
# ``input/config/hyperparameters.json``      flags and recipe keys, as text
# ``input/config/inputdataconfig.json``      the names of the channels
# ``input/config/resourceconfig.json``       the hosts
# ``input/data/<channel>/``                  images
# ``checkpoints/``                           synchronised with S3 while the job runs, restored when it starts
# ``model/``                                 becomes model.tar.gz
# ``output/data/``                           becomes output.tar.gz
# ``output/failure``                         the reason of a failure, of which 1,024 characters are shown
# =========================================  =================================================================
#
# Source: the developer guide, "Use your own training algorithms", and aws/sagemaker-training-toolkit.

BASE = "SAGEMAKER_BASE_DIR"
"""Environment variable of SageMaker's own toolkit that replaces /opt/ml."""
SPLIT_CHANNELS = ("train", "val", "valid", "validation", "test")
"""Names of channels that are splits of the data; the same folder names that finetune.data accepts."""
_FOREIGN = ("sagemaker_", "_tuning")
"""Prefixes of hyperparameters that SageMaker's Python SDK and its tuner add for themselves."""
_RESTART = "The platform writes this file: start the job again."


@dataclass(frozen=True)
class SageMaker(Platform):
    """A SageMaker training job.

    Attributes:
        base: folder of the platform's files, usually ``/opt/ml``.
    """

    base: Path = Path("/opt/ml")

    def find_data(self) -> Path | None:
        """Return the only channel, or the folder above the channels train, validation and test.

        Raises:
            UsageError: several channels may hold the images, or a channel is a pipe.
        """
        channels = _read(self.base, "inputdataconfig.json")
        for name, settings in channels.items():
            if isinstance(settings, dict) and settings.get("TrainingInputMode") == "Pipe":
                fix = "Use the input mode File or FastFile."
                raise UsageError(
                    f"channel {name}", "a pipe does not allow reading images in random order", fix
                )
        folder = self.base / "input" / "data"
        splits = sorted(name for name in channels if name.lower() in SPLIT_CHANNELS)
        candidates = splits or sorted(channels)
        if len(candidates) == 1:
            return folder / candidates[0]
        if len(splits) > 1:
            return folder
        if not channels:
            return None
        found = "it is not clear which of them hold the images"
        fix = f"Call them train, validation and test, or set the hyperparameter data to {folder}/<channel>."
        raise UsageError(f"channels {', '.join(candidates)}", found, fix)


def find_sagemaker() -> SageMaker | None:
    """Return the SageMaker training job that this process belongs to; None if there is none.

    Raises:
        UsageError: a file of the platform cannot be parsed.
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
    """Return the user's hyperparameters. SageMaker's SDK writes some values as JSON, others as text."""
    given = _read(base, "hyperparameters.json")
    return {name: _to_text(value) for name, value in given.items() if not name.startswith(_FOREIGN)}


def _to_text(value: Any) -> str:
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
        return read_object(path) if path.exists() else {}
    except (OSError, ValueError) as error:
        found = f"it cannot be read ({' '.join(str(error).split())[:200]})"
        raise UsageError(str(path), found, _RESTART) from None


# --- Vertex AI custom jobs: AIP_* variables name folders, and buckets are mounted below /gcs ------
#
# ``AIP_CHECKPOINT_DIR``, ``AIP_MODEL_DIR`` and ``AIP_TENSORBOARD_LOG_DIR`` are set if the job has a base
# output directory. ``CLUSTER_SPEC`` names the replicas.
#
# Source: Vertex AI, "Prepare training code" and the reference of CustomJobSpec.

MOUNT = Path("/gcs")
_VARIABLES = ("CLOUD_ML_JOB_ID", "AIP_MODEL_DIR", "AIP_CHECKPOINT_DIR")
"""Variables of which a custom job has at least one."""


@dataclass(frozen=True)
class Vertex(Platform):
    """A Vertex AI custom job."""

    def resolve_output(self) -> Platform:
        """Return the platform with a run folder on this machine if the bucket does not support renaming.

        A checkpoint becomes valid when its folder is renamed, in one atomic step; many buckets do not support
        that.
        """
        if not self.output.is_absolute() or can_rename_folders(self.output.parent):
            return self
        local = _local_output()
        warning = (
            f"{self.output.parent} cannot rename folders, so the run folder is {local}: a job that is "
            f"started again begins from scratch; metrics and report are copied to {self.output} at the end"
        )
        return replace(self, output=local, results=self.output, warning=warning)


def find_vertex(mount: Path = MOUNT) -> Vertex | None:
    """Return the Vertex AI custom job that this process belongs to; None if there is none.

    Args:
        mount: folder below which buckets are mounted.

    Raises:
        UsageError: CLUSTER_SPEC cannot be parsed.
    """
    if not any(os.environ.get(name) for name in _VARIABLES):
        return None
    kept = _folder("AIP_CHECKPOINT_DIR", mount)
    return Vertex(
        "Vertex AI",
        output=(kept.absolute() / "run") if kept else _local_output(),
        model=_folder("AIP_MODEL_DIR", mount),
        tensorboard=_folder("AIP_TENSORBOARD_LOG_DIR", mount),
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
    """Return whether a folder with a file in it can be renamed here; mounted buckets often refuse."""
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
    """Return the replicas that train: the primary one and those of the second worker pool."""
    text = os.environ.get("CLUSTER_SPEC") or "{}"
    try:
        pools = json.loads(text).get("cluster", {})
        return [str(replica) for pool in ("workerpool0", "workerpool1") for replica in pools.get(pool, [])]
    except (ValueError, TypeError, AttributeError, RecursionError):
        found = "it does not name the machines of the job"
        fix = "Vertex AI sets this variable: leave it unchanged, or unset it elsewhere."
        raise UsageError(f"CLUSTER_SPEC={text[:200]}", found, fix) from None


# --- all platforms -------------------------------------------------------------------------------


def find_platform() -> Platform | None:
    """Return the platform that has started this process; None if there is none.

    Raises:
        UsageError: its files or variables cannot be parsed.
    """
    return find_sagemaker() or find_vertex()


def write_failure(message: str, fix: str) -> None:
    """Write the reason of a failure to the platform's file, if this process runs on a platform."""
    with suppress(FinetuneError):
        if (platform := find_platform()) is not None:
            platform.write_failure(message, fix)
