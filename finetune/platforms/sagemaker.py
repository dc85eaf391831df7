"""Amazon SageMaker training jobs: ``docker run image train``, and everything else in files below /opt/ml.

=========================================  =================================================================
``input/config/hyperparameters.json``      flags and keys of the recipe, as text
``input/config/inputdataconfig.json``      the names of the channels
``input/config/resourceconfig.json``       the hosts
``input/data/<channel>/``                  images
``checkpoints/``                           kept in S3 while the job runs, and brought back when it starts
``model/``                                 becomes model.tar.gz
``output/data/``                           becomes output.tar.gz
``output/failure``                         the reason of a failure, of which 1,024 characters are shown
=========================================  =================================================================

Source: the developer guide, "Use your own training algorithms", and aws/sagemaker-training-toolkit.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import UsageError
from finetune.platforms.platform import Platform

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
