"""Run a command in several processes: start them, or join those that a launcher has started."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from enum import StrEnum
from multiprocessing import active_children
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from finetune.cli.output import say, show_failure
from finetune.errors import ExitCode, FinetuneError, UsageError
from finetune.launch.processes import check_processes, is_in_job, launch, report_exit, reported_exit
from finetune.system.signals import end_with_parent, signals_to_stop

if TYPE_CHECKING:
    from finetune.system.distributed import Distributed

GpusOption = Annotated[
    int | None,
    typer.Option(
        "--gpus", min=1, help="Number of GPUs of this machine that share the work.", show_default="1"
    ),
]
ProcessesOption = Annotated[
    int | None,
    typer.Option("--processes", min=1, help="Number of processes that share the work.", show_default="1"),
]


class Engine(StrEnum):
    """The launcher of the processes."""

    TORCH = "torch"
    RAY = "ray"


EngineOption = Annotated[
    Engine,
    typer.Option("--engine", help="Start the processes on this machine (torch), or on a Ray cluster (ray)."),
]
_LEAVE_SECONDS = 15.0
"""Seconds that another rank waits before it ends, so that rank 0 can write the reason: a launcher ends all
ranks as soon as one has ended."""
DEFAULT_TIMEOUT = 600.0
"""Seconds that the other ranks wait for one, by default."""


def start_processes(
    processes: int | None, gpus: int | None, device: str, engine: Engine = Engine.TORCH
) -> None:
    """Run the command line in several processes and exit with their exit code; return if one is enough.

    Args:
        processes: number of processes; None if it was not given.
        gpus: number of GPUs, with one process each; None if it was not given.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        engine: launcher of the processes.

    Raises:
        UsageError: options contradict each other.
        EnvironmentFaultError: there are fewer GPUs, or Ray is not installed.
    """
    if engine is Engine.RAY and processes is None and gpus is None:
        found = "the number of processes is missing"
        raise UsageError("--engine ray", found, "Add --processes N, or --gpus N.")
    number = check_processes(processes, gpus, device, elsewhere=engine is Engine.RAY)
    if number is not None and engine is Engine.RAY:
        from finetune.launch.ray import launch_on_ray

        raise typer.Exit(launch_on_ray(sys.argv[1:], number, gpus is not None, say))
    if number is not None:
        raise typer.Exit(launch(sys.argv[1:], number))
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a killed torchrun leaves its processes running
        end_with_parent(os.getppid())


@contextmanager
def joined_processes(device: str, timeout: float, as_json: bool = False) -> Iterator[Distributed]:
    """Join the processes of a job while the block runs; only rank 0 reports how it ended.

    Args:
        device: device that the work is done on.
        timeout: seconds that the other ranks wait for one; 0 for the default.
        as_json: whether a failure is also written to stdout, as one JSON object.
    """
    is_main = not is_in_job() or os.environ["RANK"] == "0"
    if is_in_job():
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # before torch is imported: no C++ stack traces
    with reported_exit(is_main):
        from finetune.system.distributed import SINGLE_PROCESS
        from finetune.system.join import join_distributed
        from finetune.system.watch import watched_processes

        def report(error: FinetuneError) -> None:
            if is_main:
                show_failure(error.message, error.fix, error.exit_code, as_json)
                report_exit(error.exit_code)

        distributed = join_distributed(device, timeout or DEFAULT_TIMEOUT) if is_in_job() else SINGLE_PROCESS
        with (
            nullcontext() if is_main else _silent_failures(distributed),
            watched_processes(distributed),
            distributed.before_forced_end(report),
        ):
            yield distributed


@contextmanager
def _silent_failures(distributed: Distributed) -> Iterator[None]:
    """Report an error to rank 0, and exit with its exit code without a message."""
    from finetune.runs.outcome import report_unexpected
    from finetune.system.join import leave_distributed

    try:
        with report_unexpected(distributed):
            yield
    except FinetuneError as error:
        leave_distributed(distributed)  # so that the other ranks notice
        time.sleep(_LEAVE_SECONDS)
        raise typer.Exit(int(error.exit_code)) from None


def leave(code: int) -> NoReturn:
    """Exit; at once where Python's own way out takes long or may fail.

    A rank of a job exits without closing its connections, in which torch sometimes crashes. A command that
    was interrupted waits for none of its threads and processes, which may still decode; further signals
    change nothing.
    """
    at_once = is_in_job()
    if code == ExitCode.INTERRUPTED:
        for number in signals_to_stop():
            signal.signal(number, signal.SIG_IGN)
        for child in active_children():
            child.kill()
        at_once = at_once or sum(not thread.daemon for thread in threading.enumerate()) > 1
    if at_once:
        for stream in filter(None, (sys.stdout, sys.stderr)):  # None was closed from the start
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)
