"""The dispatcher: a thread of the server that starts jobs, watches them, and records how they end.

::

    every tick                     jobs of lost servers queued again
      jobs that wait  -> claim  -> start, while slots are free
      jobs that run   -> lease renewed, those to be cancelled asked to stop
      jobs that ended -> succeeded, failed, cancelled, or retrying

It never trains, and keeps nothing in memory that the store does not know.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.errors import ExitCode, FinetuneError
from finetune.runs.folder import Outcome
from finetune.service.store.folder import StoreFolder
from finetune.service.store.jobs import LEASE, Job, JobStore
from finetune.service.store.states import State
from finetune.service.work.commands import read_outcome
from finetune.service.work.executor import Execution, Executor

TICK = 0.25
"""Seconds between two looks at the jobs."""
WAITS = (1.0, 10.0, 60.0)
"""Seconds before each further attempt at a job whose process was killed; after them it has failed."""


@dataclass
class _Running:
    job: Job
    execution: Execution
    is_stopped: bool = False


class Dispatcher:
    """Runs the jobs of a store in the slots of an executor.

    Args:
        store: the jobs.
        folder: files of the store.
        executor: starts processes.
        say: shows one line to the user.
    """

    def __init__(
        self, store: JobStore, folder: StoreFolder, executor: Executor, say: Callable[[str], None]
    ) -> None:
        self._store, self._folder, self._executor, self._say = store, folder, executor, say
        self.name = f"{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(4)}"
        self._running: dict[str, _Running] = {}
        self._ended = threading.Event()
        self._last_renewal = -LEASE
        self._thread = threading.Thread(target=self._work, name="dispatcher")

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ask the jobs of this machine to write a checkpoint and end, and wait for them.

        The next server resumes them.
        """
        self._ended.set()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the thread works."""
        return self._thread.is_alive()

    def _work(self) -> None:
        while not self._ended.wait(TICK):
            self._guarded(self.look)
        kept = {job: one for job, one in self._running.items() if one.execution.ends_with_server}
        self._running = kept  # the lease of the others runs out, and the next server goes on with them
        for running in kept.values():
            running.execution.stop()
        while self._running:
            time.sleep(TICK)
            self._guarded(self._look_at_running)

    def _guarded(self, act: Callable[[], None]) -> None:
        """Go on after an error: the database may be started again, the disk may get room."""
        try:
            act()
        except Exception as error:
            reason = str(error).splitlines() or [""]
            self._say(f"warning: {type(error).__name__}: {reason[0][:300]}; trying again")
            self._ended.wait(1.0)

    def look(self) -> None:
        """Do what is to be done now."""
        if time.monotonic() - self._last_renewal > LEASE / 3:
            self._store.renew(self.name)
            self._store.recover()
            self._last_renewal = time.monotonic()
        self._look_at_running()
        while len(self._running) < self._executor.slots and (job := self._store.claim(self.name)) is not None:
            self._begin(job)

    def _begin(self, job: Job) -> None:
        try:
            execution = self._executor.start(job, self._folder.job(job.id))
        except Exception as error:  # or the job would be renewed for ever, and never run
            self._end(job, _cannot_start(error), 1)
            return
        self._running[job.id] = _Running(job, execution)
        self._say(f"job {job.id}: attempt {job.attempt} started")

    def _look_at_running(self) -> None:
        for running in [*self._running.values()]:
            code = running.execution.poll()
            if code is not None:
                self._end(
                    running.job, read_outcome(running.job.kind, self._folder.job(running.job.id), code), code
                )
                del self._running[running.job.id]
        if self._running:
            self._stop_cancelled()

    def _stop_cancelled(self) -> None:
        """Stop the jobs that are to be cancelled, and those that this server has lost to another one."""
        mine = self._store.list_running(self.name)
        kept = {(job.id, job.attempt) for job in mine if job.state == State.RUNNING}
        for running in self._running.values():
            if (running.job.id, running.job.attempt) not in kept and not running.is_stopped:
                running.is_stopped = True
                running.execution.stop()

    def _end(self, job: Job, outcome: Mapping[str, Any], code: int) -> None:
        state, wait = self._decide(job, outcome, code)
        if self._store.finish(job, state, outcome, wait):
            self._say(f"job {job.id}: {state} ({outcome.get('message', '')})")

    def _decide(self, job: Job, outcome: Mapping[str, Any], code: int) -> tuple[State, float]:
        """Return the state after an attempt, and the seconds before the next one."""
        if code == ExitCode.DONE:
            return State.SUCCEEDED, 0.0
        if self._store.get(job.id).state == State.CANCELLING:
            return State.CANCELLED, 0.0
        if code == ExitCode.INTERRUPTED:  # this server is stopping, or somebody stopped the process
            return State.RETRYING, 0.0
        if outcome.get("retryable") and job.attempt <= len(WAITS):
            return State.RETRYING, WAITS[job.attempt - 1]
        return State.FAILED, 0.0


def _cannot_start(error: Exception) -> Mapping[str, Any]:
    """Return the outcome of an attempt that did not start; the next one may, when the disk or cluster can."""
    if isinstance(error, FinetuneError):
        return Outcome.of(error, 0, 0).to_dict() | {"retryable": True}
    hint = "Free memory or processes of this machine, or lower --slots."
    return Outcome("failed", f"no process can be started ({error})", hint, 70, "internal", True).to_dict()
