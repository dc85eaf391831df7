"""Vertex AI custom jobs: folders are named in AIP_* variables, and buckets are mounted below /gcs.

``AIP_CHECKPOINT_DIR``, ``AIP_MODEL_DIR`` and ``AIP_TENSORBOARD_LOG_DIR`` are set where the job has a base
output directory. ``CLUSTER_SPEC`` names the replicas.

Source: Vertex AI, "Prepare training code" and the reference of CustomJobSpec.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.errors import UsageError
from finetune.platforms.platform import Platform

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
