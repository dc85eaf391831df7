"""A Ray Train worker: starts one process of the run, passes on what it says, and ends with it."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.backend import Backend, BackendConfig

from finetune import __version__
from finetune.errors import ExitCode
from finetune.launch.mailbox import Kind, LaunchSpec, Message
from finetune.launch.processes import REPORT
from finetune.launch.supervisor import own_command
from finetune.system.heartbeat import VARIABLE

_TICK = 0.2
"""Seconds between two looks at the desk."""
_PATIENCE = 60.0
"""Seconds that the desk may not answer before the driver counts as gone."""


class _Contract(Backend):  # type: ignore[misc]
    """Tells every worker where the process of rank 0 is to be found: torch's MASTER_ADDR and MASTER_PORT.

    Ray's own backend for torch would join the workers themselves as well, for nothing, and lay hold of the
    memory of their GPUs.
    """

    share_cuda_visible_devices = True  # NCCL wants to see the GPUs of its neighbours

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:  # noqa: ARG002 - Ray's shape
        """Ask the machine of rank 0 for a port, and tell all."""
        worker_group.execute(_set_master, *worker_group.execute_single(0, _find_master))


class ContractConfig(BackendConfig):  # type: ignore[misc]
    """What a trainer needs to be given so that its workers know of each other."""

    @property
    def backend_cls(self) -> type[Backend]:
        """The backend."""
        return _Contract


def _find_master() -> tuple[str, int]:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), probe.getsockname()[1]


def _set_master(address: str, port: int) -> None:
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)


def work(config: dict[str, Any]) -> None:
    """Run the process of this worker's rank to its end, however that comes.

    Args:
        config: ``order``, an :class:`Order`, and ``desk``, the actor to report to.
    """
    order: LaunchSpec = config["order"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    place = {
        "RANK": rank,
        "WORLD_SIZE": context.get_world_size(),
        "LOCAL_RANK": context.get_local_rank(),
        "LOCAL_WORLD_SIZE": context.get_local_world_size(),
    }
    wire = _Wire(config["desk"], rank)
    wire.put(Kind.STARTED)
    if refusal := _find_refusal(order):
        wire.put(Kind.STDERR, refusal.encode() + b"\n")
        wire.put(Kind.EXIT, str(int(ExitCode.ENVIRONMENT)).encode())
        wire.exchange()
        return
    with tempfile.TemporaryDirectory(prefix="finetune-") as home:
        report = Path(home) / "exit"
        told = {name: str(value) for name, value in place.items()} | {REPORT: str(report)}
        code = _run(order, told, wire)
        with suppress(OSError, ValueError):
            code = int(report.read_text(encoding="utf-8"))
    wire.put(Kind.EXIT, str(code).encode())
    wire.exchange()


def _find_refusal(order: LaunchSpec) -> str | None:
    """Return why this machine cannot take part."""
    here = socket.gethostname()
    if order.version != __version__:
        return f"error: {here} has finetune {__version__}, and the command is of {order.version}"
    if not Path(order.folder).is_dir():
        fix = "Every machine has to see the same files in the same places."
        return f"error: {here} does not see the working folder {order.folder}\n{fix}"
    return None


@dataclass
class _Wire:
    """To the desk, and what comes back from it."""

    mailbox: Any
    rank: int

    def __post_init__(self) -> None:
        self._letters: list[Message] = []

    def put(self, kind: Kind, content: bytes = b"") -> None:
        """Add a letter to the next post."""
        self._letters.append(Message(self.rank, kind, content))

    def exchange(self) -> int:
        """Post what there is; return how many times the process was asked to stop.

        Raises:
            RayError: the driver is gone.
        """
        letters, self._letters = self._letters, []
        stops: int = ray.get(self.mailbox.post.remote(letters), timeout=_PATIENCE)
        return stops


def _run(order: LaunchSpec, told: dict[str, str], wire: _Wire) -> int:
    """Start the process, pass on what it says and what it is told, and return its exit code.

    Raises:
        RayError: the driver is gone; the process has been killed.
    """
    with _started(order, told) as (child, pipes):
        stops, silent = 0, False
        try:
            while not silent:
                silent = child.poll() is not None
                for kind, content in pipes.read(0.0 if silent else _TICK):
                    wire.put(kind, content)
                asked = wire.exchange()
                for _ in range(asked - stops):
                    child.send_signal(signal.SIGTERM)
                stops = asked
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        return child.wait()


@contextmanager
def _started(order: LaunchSpec, told: dict[str, str]) -> Iterator[tuple[subprocess.Popen[bytes], _Pipes]]:
    reading, writing = os.pipe()
    own = dict(os.environ)
    own.pop("OMP_NUM_THREADS", None)  # Ray sets it to the processors that it counts for a worker: one
    own |= {**order.environment, **told}
    own[VARIABLE] = f"{writing}:{os.getpid()}"
    own.pop("RAY_AUTH_TOKEN", None)
    try:
        child = subprocess.Popen(  # noqa: S603 - our own program, and the user's own words
            [*own_command(), *order.arguments],
            cwd=order.folder,
            env=own,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[writing],
            start_new_session=True,
        )
    finally:
        os.close(writing)
    with child, os.fdopen(reading, "rb", buffering=0) as heartbeat:
        assert child.stdout and child.stderr
        pipes = {
            child.stdout.fileno(): Kind.STDOUT,
            child.stderr.fileno(): Kind.STDERR,
            heartbeat.fileno(): Kind.PULSE,
        }
        yield child, _Pipes(pipes)


class _Pipes:
    """What a process writes, by kind."""

    def __init__(self, kinds: dict[int, Kind]) -> None:
        self._selector = selectors.DefaultSelector()
        for pipe, kind in kinds.items():
            os.set_blocking(pipe, False)
            self._selector.register(pipe, selectors.EVENT_READ, kind)

    def read(self, seconds: float) -> Iterator[tuple[Kind, bytes]]:
        """Yield what comes in within so many seconds, and all that is there already."""
        deadline = time.monotonic() + seconds
        while True:
            ready = self._selector.select(max(0.0, deadline - time.monotonic()))
            for key, _ in ready:
                content = os.read(key.fd, 1 << 16)
                if content:
                    yield key.data, content
                else:
                    self._selector.unregister(key.fileobj)
            if not ready or (seconds and time.monotonic() >= deadline):
                return
