"""Several processes on one machine, started by torch's elastic launcher.

::

    finetune run --gpus 4      the supervisor (finetune.launch.supervisor), without torch
      '- finetune run ...      torch's launcher: holds the store and watches its processes
         '- finetune run ...   four of them, each in its own session, with RANK and the other variables set

The launcher restarts nothing: torch's restart in place was seen to hang, because attempts share a store. A
job that has lost a process ends, and the supervisor starts the whole job again.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from finetune.errors import EnvironmentFaultError, ExitCode, FinetuneError, UsageError
from finetune.launch.supervisor import own_command
from finetune.system.heartbeat import VARIABLE, Heartbeat, find_parent
from finetune.system.temporary import temporary_folder

REPORT = "FINETUNE_REPORT"
"""Environment variable: the file into which the main process writes its exit code. Those of the other
processes and of torch's launcher only say which process noticed first that another one had ended."""
_SAVE_SECONDS = 300
"""Seconds that processes have to save and end after a signal; the supervisor's own limit is shorter. After a
failure torch's launcher gives them 30 seconds, of which they need a part (:mod:`finetune.system.watch`)."""


def is_started_here() -> bool:
    """Return whether this process was started by :func:`launch`."""
    return REPORT in os.environ


def is_in_job() -> bool:
    """Return whether any launcher has started this process as one of several."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def check_processes(
    processes: int | None, gpus: int | None, device: str, elsewhere: bool = False
) -> int | None:
    """Return how many processes to start; None to start none.

    Args:
        processes: the value of ``--processes``.
        gpus: the value of ``--gpus``.
        device: the value of ``--device``.
        elsewhere: whether the GPUs belong to other machines, so that those of this machine are not counted.

    Raises:
        UsageError: options contradict each other, or a launcher has started the processes already.
        EnvironmentFaultError: this machine has fewer GPUs.
    """
    number = gpus if gpus is not None else processes
    if number is None or is_started_here():
        return None
    asked = f"--gpus {gpus}" if gpus is not None else f"--processes {processes}"
    if gpus is not None and processes is not None:
        found = "both set the number of processes"
        raise UsageError(f"{asked} --processes {processes}", found, "Drop one of the two.")
    if is_in_job():
        found = "a launcher has already started the processes of this job (RANK is set)"
        raise UsageError(asked, found, f"Drop {asked.partition(' ')[0]}, or start without the launcher.")
    if ":" in device or (gpus is not None and device == "cpu"):
        found = "each process uses its own GPU"
        raise UsageError(f"{asked} --device {device}", found, "Drop --device.")
    if gpus is not None and not elsewhere:
        _check_gpus(gpus)
    return number


def _check_gpus(gpus: int) -> None:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < gpus:
        found = f"this machine shows {count} CUDA devices to torch {torch.__version__}"
        fix = "Ask for fewer, check the driver, or take --processes N --device cpu."
        raise EnvironmentFaultError(f"--gpus {gpus}", found, fix)


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run the command in several processes, and return the exit code of the job.

    Args:
        arguments: command-line arguments after ``finetune``. The processes see in their environment that a
            launcher has started them.
        processes: number of processes, at least 1.
    """
    logging.disable(logging.CRITICAL)  # torch's launcher would repeat the errors that the processes show
    with temporary_folder() as folder:
        report = folder / "exit"
        os.environ.update(_environment(report, processes))
        return _conclude(report, *_run(arguments, processes))


def _run(arguments: Sequence[str], processes: int) -> tuple[ExitCode, Mapping[int, Any]]:
    """Run all processes to their end; return the exit code, and torch's records of failures by rank."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        shutdown_timeout=_SAVE_SECONDS,
    )
    program, *options = own_command()
    try:
        elastic_launch(config, program)(*options, *arguments)
    except ChildFailedError as error:
        return ExitCode.INTERNAL, error.failures
    except SignalException:  # forwarded to all processes, which have ended by now
        return ExitCode.INTERRUPTED, {}
    return ExitCode.DONE, {}


def _environment(report: Path, processes: int) -> dict[str, str]:
    """Return the environment variables of the processes, besides those that torch's launcher sets."""
    variables = {REPORT: str(report)}
    if (parent := find_parent()) is not None:
        # torch's launcher does not hand the supervisor's pipe down, so it is opened by its path (Linux).
        variables[VARIABLE] = f"/proc/{os.getpid()}/fd/{parent[0]}:{os.getpid()}"
    if sys.platform == "linux":
        # Loopback: a container may have no network, or a host name that does not resolve.
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            variables[name] = os.environ.get(name, "lo")
    if "OMP_NUM_THREADS" not in os.environ:
        from finetune.system.device import available_cores

        variables["OMP_NUM_THREADS"] = str(max(1, available_cores() // processes))
    return variables


def _conclude(report: Path, code: ExitCode, failures: Mapping[int, Any]) -> int:
    """Return the exit code that the main process reported, else that of the first failed process."""
    with suppress(OSError, ValueError):
        reported = int(report.read_text(encoding="utf-8"))
        if reported == ExitCode.INTERRUPTED and failures and (parent := find_parent()):
            Heartbeat(parent[0]).send({"lost": True})  # no signal came from outside: a process has failed
        return reported
    if not failures:
        return int(code)
    first = min(failures.values(), key=lambda failure: failure.timestamp)
    if first.exitcode < 0:
        end_by(-first.exitcode)
    return int(first.exitcode)


def end_by(number: int) -> None:
    """End this process by a signal, so that its parent sees how the main process ended.

    Args:
        number: number of the signal.
    """
    with suppress(OSError, ValueError):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


@contextmanager
def reported_exit(is_main: bool) -> Iterator[None]:
    """Write the exit code of the main process for its launcher, however the block ends."""
    code = ExitCode.DONE
    try:
        yield
    except FinetuneError as error:
        code = error.exit_code
        raise
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
        raise
    except BaseException:
        code = ExitCode.INTERNAL
        raise
    finally:
        if is_main:
            report_exit(code)


def report_exit(code: ExitCode) -> None:
    """Write the exit code of the main process for its launcher, if :func:`launch` has started it."""
    if is_started_here():
        with suppress(OSError):
            Path(os.environ[REPORT]).write_text(str(int(code)), encoding="utf-8")
