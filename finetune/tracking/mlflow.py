"""MLflow: files in the run folder, or the server that MLFLOW_TRACKING_URI names."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

# MLflow reads these when it is imported and later. Values that the user has set are kept.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # the only local store that needs no database
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is for results
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")  # seconds to wait for a silent server
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from finetune.tracking.tracker import EPOCH_METRICS, PROJECT, End, TrackedRun

_STATUS: dict[End, str] = {"done": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
_LONGEST = 500
"""Largest number of characters of a parameter that every store accepts."""
_MOST_PARAMETERS = 100
"""Largest number of parameters in one request."""


class MLflow:
    """Logs metrics by epoch, and the recipe as parameters, which MLflow does not allow to change later.

    Only ``MlflowClient`` is used: MLflow's module functions have global state and exit hooks.
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

    def log_final(self, metrics: Mapping[str, float], epoch: int) -> None:
        """Log the final metrics under ``final/``."""
        self._log({f"final/{name}": value for name, value in metrics.items()}, epoch)

    def close(self, end: End) -> None:
        """Set the status of the run."""
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

    def _log(self, metrics: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        entries = [Metric(name, value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self.run_id, metrics=entries)
