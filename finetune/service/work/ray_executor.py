"""Jobs on a Ray cluster, through Ray's own REST interface: the cluster places them, this server watches.

The store's folder must be on a disk that all machines of the cluster share. Ray tries no job again and keeps
no order between servers: attempts, waits and the record of what happened stay ours. A job outlives the server
that submitted it; the next one goes on with the process that it finds.

Two settings of the cluster matter, since Ray's defaults end jobs (docs/service.md):
``RAY_JOB_STOP_WAIT_TIME_S``, 3 seconds by default, in which no checkpoint is written; and
``RAY_JOB_START_TIMEOUT_SECONDS``, after which a job that finds no room fails.
"""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Mapping
from typing import Any

import httpx

from finetune.errors import EnvironmentFaultError, ExitCode
from finetune.runs.files import write_bytes
from finetune.runs.reader import RunReader
from finetune.service.store.folder import JobFolder
from finetune.service.store.jobs import Job
from finetune.service.work.commands import prepare

TOKEN_VARIABLE = "RAY_AUTH_TOKEN"  # noqa: S105 - the name of a variable
LOOK = 2.0
"""Seconds between two questions about a job, and between two copies of its log."""
_SIGNALS = 128
"""The shell of a cluster gives this and the number of the signal for a process that one has ended."""
_ENDED = {"SUCCEEDED", "FAILED", "STOPPED"}


class RayExecutor:
    """Submits attempts to a Ray cluster.

    Args:
        address: of the cluster's dashboard, ``http://HOST:8265``.
        slots: jobs that run at the same time.
        num_gpus: GPUs of each.

    Raises:
        EnvironmentFaultError: the cluster does not answer, or refuses the token.
    """

    def __init__(self, address: str, slots: int, num_gpus: float) -> None:
        token = os.environ.get(TOKEN_VARIABLE, "")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.slots, self._num_gpus = slots, num_gpus
        self._http = httpx.Client(base_url=address, headers=headers, timeout=30)
        self._ask("GET", "/api/version")

    def start(self, job: Job, folder: JobFolder) -> RayExecution:
        """Submit an attempt, or go on with an earlier one that still runs.

        The id of an attempt is the same however often it is submitted.

        Raises:
            EnvironmentFaultError: the cluster does not answer.
            DiskError: the job's folder cannot be written.
        """
        if (running := self._find_running(job)) is not None:
            return RayExecution(self, running, job, folder)
        words = ["python", "-P", "-m", "finetune", *prepare(job.kind, job.recipe, folder)]
        attempt = f"{job.id}-a{job.attempt}"
        body: dict[str, Any] = {"entrypoint": shlex.join(words), "submission_id": attempt}
        body |= {"entrypoint_num_gpus": self._num_gpus, "metadata": {"finetune_job": job.id}}
        if self.find(attempt) is None:  # an answer may have been lost
            self._ask("POST", "/api/jobs/", json=body)
        return RayExecution(self, attempt, job, folder)

    def _find_running(self, job: Job) -> str | None:
        """Return the latest earlier attempt that has not ended: that of a server that was lost."""
        for number in range(job.attempt - 1, 0, -1):
            attempt = f"{job.id}-a{number}"
            found = self.find(attempt)
            if found is not None:
                return attempt if found["status"] not in _ENDED else None
        return None

    def _ask(self, method: str, path: str, *, may_be_missing: bool = False, **more: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, path, **more)
        except httpx.TransportError as error:
            raise self._error(" ".join(str(error).split())[:200]) from None
        is_missing = may_be_missing and answer.status_code == httpx.codes.NOT_FOUND
        if answer.is_error and not is_missing:
            raise self._error(f"it answered {answer.status_code}: {answer.text[:200]}")
        return answer

    def _error(self, found: str) -> EnvironmentFaultError:
        fix = f"Check the cluster (`ray status`), its address, and {TOKEN_VARIABLE}."
        return EnvironmentFaultError(f"the Ray cluster {self._http.base_url}", found, fix)

    # --- for executions ------------------------------------------------------------------------------

    def find(self, attempt: str) -> Mapping[str, Any] | None:
        """Return what Ray knows of an attempt; None if it does not know it, or no more."""
        answer = self._ask("GET", f"/api/jobs/{attempt}", may_be_missing=True)
        found: Mapping[str, Any] = answer.json() if answer.is_success else {}
        return found or None

    def read_log(self, attempt: str) -> bytes:
        """Return what an attempt has written so far."""
        answer = self._ask("GET", f"/api/jobs/{attempt}/logs")
        return str(answer.json().get("logs", "")).encode()

    def stop(self, attempt: str) -> None:
        """Ask an attempt to end: SIGTERM, and after the cluster's stop time SIGKILL."""
        self._ask("POST", f"/api/jobs/{attempt}/stop")


class RayExecution:
    """An attempt on a cluster.

    Args:
        executor: speaks to the cluster.
        attempt: Ray's id of it.
        job: the job.
        folder: its folder, on the shared disk.
    """

    ends_with_server = False

    def __init__(self, executor: RayExecutor, attempt: str, job: Job, folder: JobFolder) -> None:
        self._executor, self._attempt, self._job, self._folder = executor, attempt, job, folder
        self._looked = -LOOK
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code; None while the attempt waits or runs, or the cluster does not answer."""
        if self._code is None and time.monotonic() - self._looked >= LOOK:
            self._looked = time.monotonic()
            try:
                found = self._executor.find(self._attempt)
                if found is not None:
                    write_bytes(self._folder.log(self._job.attempt), self._executor.read_log(self._attempt))
            except EnvironmentFaultError:
                return None  # a cluster that is being started again: the lease goes on
            if found is None or found["status"] in _ENDED:
                self._code = self._read_code(found or {})
        return self._code

    def _read_code(self, found: Mapping[str, Any]) -> int:
        """Return the exit code of an attempt that has ended; that of a kill if nothing says how."""
        outcome = RunReader(self._folder.run, tolerant=True).outcome
        if found.get("status") == "FAILED" and (code := found.get("driver_exit_code")) is not None:
            is_signal = code > _SIGNALS and code != outcome.get("exit_code")
            return _SIGNALS - code if is_signal else int(code)
        if found.get("status") == "SUCCEEDED" or outcome.get("state") == "done":
            return int(ExitCode.DONE)
        if outcome.get("state") in ("failed", "interrupted"):
            return int(outcome["exit_code"])
        return int(ExitCode.INTERRUPTED) if found.get("status") == "STOPPED" else -signal.SIGKILL

    def stop(self) -> None:
        """Ask the attempt to write a checkpoint and end."""
        self._executor.stop(self._attempt)
