"""Executors: where the process of a job runs. This one starts it on the machine of the server."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from finetune.launch.supervisor import own_command
from finetune.service.settings import own_environment
from finetune.service.store.folder import JobFolder
from finetune.service.store.jobs import Job
from finetune.service.work.commands import prepare

_MODULE = "finetune.service.work.job_process"
_DRIVER = Path("/proc/driver/nvidia/gpus")


def find_gpus() -> list[str]:
    """Return the visible GPUs, as ``CUDA_VISIBLE_DEVICES`` names them, without loading torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1", "none")]
    number = len(list(_DRIVER.iterdir())) if _DRIVER.is_dir() else 0
    return [str(index) for index in range(number)]


class Execution(Protocol):
    """A running attempt."""

    ends_with_server: bool
    """Whether it is stopped when its server stops; others go on, and the next server finds them."""

    def poll(self) -> int | None:
        """Return the exit code, negative for the signal that ended it; None while it runs."""

    def stop(self) -> None:
        """Ask it to write a checkpoint and end; asked a second time, it ends at once."""


class Executor(Protocol):
    """Starts attempts."""

    slots: int
    """Attempts that may run at the same time."""

    def start(self, job: Job, folder: JobFolder) -> Execution:
        """Start an attempt at a job.

        Raises:
            DiskError: its folder cannot be written.
            OSError: no process can be started.
        """


class LocalExecutor:
    """Starts jobs as processes of this machine, each on a GPU of its own where there are any.

    Args:
        slots: jobs that run at the same time; by default one for each visible GPU, and one without.
        gpus: names of the visible GPUs, as in ``CUDA_VISIBLE_DEVICES``.
    """

    def __init__(self, slots: int | None = None, gpus: Sequence[str] = ()) -> None:
        self.slots = slots or max(1, len(gpus))
        self._free = [gpus[number % len(gpus)] if gpus else "" for number in range(self.slots)]

    def start(self, job: Job, folder: JobFolder) -> LocalExecution:
        """Start an attempt at a job; see :class:`Executor`."""
        gpu = self._free.pop(0)
        try:
            return LocalExecution(self._open(job, folder, gpu), lambda: self._free.append(gpu))
        except BaseException:
            self._free.append(gpu)
            raise

    def _open(self, job: Job, folder: JobFolder, gpu: str) -> subprocess.Popen[bytes]:
        words = prepare(job.kind, job.recipe, folder)
        own = own_command()
        command = [*own[:-1], _MODULE, str(os.getpid()), *words]  # python [-P] -m MODULE
        environment = own_environment() | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
        with folder.log(job.attempt).open("ab") as log:
            return subprocess.Popen(  # noqa: S603 - our own program, and a validated recipe
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C stops the server, which stops its jobs
                cwd=Path.home() if Path.home().is_dir() else "/",
            )


class LocalExecution:
    """A process of this machine. Its end gives back its slot.

    Args:
        process: the process.
        release: called once when it has ended.
    """

    ends_with_server = True

    def __init__(self, process: subprocess.Popen[bytes], release: object) -> None:
        self._process, self._release = process, release

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""
        code = self._process.poll()
        if code is not None and callable(self._release):
            self._release()
            self._release = None
        return code

    def stop(self) -> None:
        """Send SIGTERM, as the supervisor of the run expects it."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
