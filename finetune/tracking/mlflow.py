"""MLflow: files in the run folder, or the server that MLFLOW_TRACKING_URI names."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

# Read while it is imported, and later. Whoever sets one of these is listened to.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # the only local store that needs no database
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # which belongs to results
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")  # seconds that a silent server costs the run
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from finetune.tracking.tracker import EPOCH_METRICS, PROJECT, End, TrackedRun

_STATUS: dict[End, str] = {"done": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
_LONGEST = 500
"""Characters of a parameter that every store takes."""
_MOST_PARAMETERS = 100
"""In one request."""


class MLflow:
    """Logs metrics by epoch, and the recipe as parameters, which MLflow never changes once they are written.

    Only its plain client is used: the module's own functions have a global state, and hooks at the exit.
    """

    def __init__(self, run_info: TrackedRun, run_id: str) -> None:
        local = (run_info.home / "mlflow").as_uri()
        self._client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or local)
        self.run_id = run_id or self._create(run_info)
        if run_id:
            self._client.update_run(run_id, status="RUNNING")

    def log_epoch(self, row: Mapping[str, float]) -> None:
        """Log one row of the history."""
        self._log({name: row[name] for name in EPOCH_METRICS}, int(row["epoch"]))

    def log_final(self, figures: Mapping[str, float], epoch: int) -> None:
        """Log the final metrics under ``final/``."""
        self._log({f"final/{name}": value for name, value in figures.items()}, epoch)

    def close(self, end: End) -> None:
        """Say how the run ended."""
        self._client.set_terminated(self.run_id, _STATUS[end])

    def _create(self, run_info: TrackedRun) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known is not None else self._client.create_experiment(name)
        tags = {"finetune.folder": run_info.folder}
        run_id = str(self._client.create_run(experiment, tags=tags, run_name=run_info.name).info.run_id)
        parameters = [Param(key, str(value)[:_LONGEST]) for key, value in run_info.settings.items()]
        for start in range(0, len(parameters), _MOST_PARAMETERS):
            self._client.log_batch(run_id, params=parameters[start : start + _MOST_PARAMETERS])
        return run_id

    def _log(self, figures: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in figures.items()]
        self._client.log_batch(self.run_id, metrics=metrics)
