"""Several processes on one machine, started by torch's elastic launcher.

::

    finetune run --gpus 4      watches over the job (finetune.launch.supervisor), no torch
      '- finetune run ...      torch's launcher: a store, and an eye on its processes
         '- finetune run ...   four of them, each in a session of its own, with RANK and the rest set

The launcher starts nothing again: torch's restart in place was seen to hang, for attempts share a store. A
job that lost a process ends, and whoever watches over it starts all of it again.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from finetune.errors import EnvironmentFaultError, ExitCode, FinetuneError, UsageError
from finetune.launch.supervisor import own_command
from finetune.system.heartbeat import VARIABLE, Heartbeat, find_parent

REPORT = "FINETUNE_REPORT"
"""Environment variable: the file into which the main process writes its exit code. Those of the others, and
torch's own, say which process noticed first that another one was gone."""
_SAVE_SECONDS = 3600
"""That processes may take to leave after a signal: whoever watches over the job has a shorter patience."""


def is_started_here() -> bool:
    """Return whether this process was started by :func:`launch`."""
    return REPORT in os.environ


def is_in_job() -> bool:
    """Return whether any launcher has started this process as one of several."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def check_processes(
    processes: int | None, gpus: int | None, device: str, elsewhere: bool = False
) -> int | None:
    """Return how many processes are to be started; None where none are.

    Args:
        processes: as the command says.
        gpus: as the command says.
        device: as the command says.
        elsewhere: the GPUs are those of other machines, and are not counted here.

    Raises:
        UsageError: options contradict each other, or another launcher has started processes already.
        EnvironmentFaultError: there are fewer GPUs.
    """
    number = gpus if gpus is not None else processes
    if number is None or is_started_here():
        return None
    asked = f"--gpus {gpus}" if gpus is not None else f"--processes {processes}"
    if gpus is not None and processes is not None:
        raise UsageError(f"{asked} --processes {processes}", "they ask for the same", "Drop one of the two.")
    if is_in_job():
        found = "a launcher has started the processes of this job already (RANK is set)"
        raise UsageError(asked, found, f"Drop {asked.partition(' ')[0]}, or start without the launcher.")
    if ":" in device or (gpus is not None and device == "cpu"):
        found = "each process takes a GPU of its own"
        raise UsageError(f"{asked} --device {device}", found, "Drop --device.")
    if gpus is not None and not elsewhere:
        _check_gpus(gpus)
    return number


def _check_gpus(gpus: int) -> None:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < gpus:
        found = f"this machine shows {count} CUDA devices to torch {torch.__version__}"
        fix = "Ask for fewer, look at the driver, or take --processes N --device cpu."
        raise EnvironmentFaultError(f"--gpus {gpus}", found, fix)


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run this program's command in several processes, and return the exit code of all.

    Args:
        arguments: of the command, as they stand after ``finetune``. The processes know from their environment
            that they have been started.
        processes: at least one.
    """
    # torch's launcher says in its own words what the processes say in ours.
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        report = Path(folder) / "exit"
        os.environ.update(_environment(report, processes))
        return _conclude(report, *_run(arguments, processes))


def _run(arguments: Sequence[str], processes: int) -> tuple[ExitCode, Mapping[int, Any]]:
    """Wait for all processes; return how it ended, and what torch says of those that failed."""
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
    command, *words = own_command()
    try:
        elastic_launch(config, command)(*words, *arguments)
    except ChildFailedError as error:
        return ExitCode.INTERNAL, error.failures
    except SignalException:  # passed on to all processes, which have ended by now
        return ExitCode.INTERRUPTED, {}
    return ExitCode.DONE, {}


def _environment(report: Path, processes: int) -> dict[str, str]:
    """Return what the processes are told beside torch's own words."""
    told = {REPORT: str(report)}
    if (parent := find_parent()) is not None:
        # The pipe to whoever watches, which the launcher does not hand down: opened by its path (Linux).
        told[VARIABLE] = f"/proc/{os.getpid()}/fd/{parent[0]}:{os.getpid()}"
    if sys.platform == "linux":
        # One machine needs no network; a container may have none, and a name that leads nowhere.
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            told[name] = os.environ.get(name, "lo")
    if "OMP_NUM_THREADS" not in os.environ:
        from finetune.system.device import available_cores

        told["OMP_NUM_THREADS"] = str(max(1, available_cores() // processes))
    return told


def _conclude(report: Path, code: ExitCode, failures: Mapping[int, Any]) -> int:
    """Return the main process's own exit code; without one, end as what failed first did."""
    with suppress(OSError, ValueError):
        reported = int(report.read_text(encoding="utf-8"))
        if reported == ExitCode.INTERRUPTED and failures and (parent := find_parent()):
            Heartbeat(parent[0]).tell({"lost": True})  # not by a signal from outside: a process has failed
        return reported
    if not failures:
        return int(code)
    first = min(failures.values(), key=lambda failure: failure.timestamp)
    if first.exitcode < 0:
        end_by(-first.exitcode)
    return int(first.exitcode)


def end_by(number: int) -> None:
    """End as the process did, so that whoever waits sees a crash as a crash."""
    with suppress(OSError, ValueError):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


@contextmanager
def reported_exit(is_main: bool) -> Iterator[None]:
    """Leave the exit code of the main process to its launcher, whatever the block ends with."""
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
        if is_main and is_started_here():
            with suppress(OSError):
                Path(os.environ[REPORT]).write_text(str(int(code)), encoding="utf-8")
