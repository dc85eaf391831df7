"""A Ray Train worker: starts the process of one rank, forwards its output, and ends with it."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
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
from finetune.launch.mailbox import LaunchSpec, Message, MessageKind
from finetune.launch.processes import REPORT
from finetune.launch.supervisor import own_command
from finetune.system.heartbeat import VARIABLE
from finetune.system.temporary import temporary_folder

_TICK = 0.2
"""Seconds between two exchanges with the mailbox."""
_TIMEOUT = 60.0
"""Seconds without an answer of the mailbox after which the driver counts as gone."""


class _Rendezvous(Backend):  # type: ignore[misc]
    """Gives every worker the address of rank 0: torch's MASTER_ADDR and MASTER_PORT.

    Ray's own backend for torch would also connect the workers themselves, which is not needed and takes
    memory of their GPUs.
    """

    share_cuda_visible_devices = True  # NCCL needs to see the other GPUs of the machine

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:  # noqa: ARG002 - Ray's shape
        """Find a free port on the machine of rank 0, and send the address to all workers."""
        worker_group.execute(_set_master, *worker_group.execute_single(0, _find_master))


class RendezvousConfig(BackendConfig):  # type: ignore[misc]
    """Configuration that makes a Ray trainer use :class:`_Rendezvous`."""

    @property
    def backend_cls(self) -> type[Backend]:
        """The backend class."""
        return _Rendezvous


def _find_master() -> tuple[str, int]:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), probe.getsockname()[1]


def _set_master(address: str, port: int) -> None:
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)


def work(config: dict[str, Any]) -> None:
    """Run the process of this worker's rank to its end.

    Args:
        config: ``spec``, a :class:`~finetune.launch.mailbox.LaunchSpec`, and ``mailbox``, the actor to report
            to.
    """
    spec: LaunchSpec = config["spec"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    ranks = {
        "RANK": rank,
        "WORLD_SIZE": context.get_world_size(),
        "LOCAL_RANK": context.get_local_rank(),
        "LOCAL_WORLD_SIZE": context.get_local_world_size(),
    }
    connection = _Connection(config["mailbox"], rank)
    connection.put(MessageKind.STARTED)
    if error := _find_error(spec):
        connection.put(MessageKind.STDERR, error.encode() + b"\n")
        connection.put(MessageKind.EXIT, str(int(ExitCode.ENVIRONMENT)).encode())
        connection.exchange()
        return
    with temporary_folder() as home:
        report = home / "exit"
        variables = {name: str(value) for name, value in ranks.items()} | {REPORT: str(report)}
        code = _run(spec, variables, connection)
        with suppress(OSError, ValueError):
            code = int(report.read_text(encoding="utf-8"))
    connection.put(MessageKind.EXIT, str(code).encode())
    connection.exchange()


def _find_error(spec: LaunchSpec) -> str | None:
    """Return an error message if this machine cannot run the command."""
    here = socket.gethostname()
    if spec.version != __version__:
        return f"error: {here} has finetune {__version__}, but the command was started with {spec.version}"
    if not Path(spec.folder).is_dir():
        fix = "Every machine must see the same files at the same paths."
        return f"error: {here} does not see the working folder {spec.folder}\n{fix}"
    return None


@dataclass
class _Connection:
    """The worker's connection to the mailbox."""

    mailbox: Any
    rank: int

    def __post_init__(self) -> None:
        self._messages: list[Message] = []

    def put(self, kind: MessageKind, content: bytes = b"") -> None:
        """Add a message that the next :meth:`exchange` sends."""
        self._messages.append(Message(self.rank, kind, content))

    def exchange(self) -> int:
        """Send the messages; return how many times the process was asked to stop.

        Raises:
            RayError: the driver is gone.
        """
        messages, self._messages = self._messages, []
        stops: int = ray.get(self.mailbox.post.remote(messages), timeout=_TIMEOUT)
        return stops


def _run(spec: LaunchSpec, variables: dict[str, str], connection: _Connection) -> int:
    """Run the process, forward its output and the signals to it, and return its exit code.

    Raises:
        RayError: the driver is gone; the process has been killed.
    """
    with _started(spec, variables) as (child, pipes):
        stops, ended = 0, False
        try:
            while not ended:
                ended = child.poll() is not None
                for kind, content in pipes.read(0.0 if ended else _TICK):
                    connection.put(kind, content)
                asked = connection.exchange()
                for _ in range(asked - stops):
                    child.send_signal(signal.SIGTERM)
                stops = asked
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        return child.wait()


@contextmanager
def _started(spec: LaunchSpec, variables: dict[str, str]) -> Iterator[tuple[subprocess.Popen[bytes], _Pipes]]:
    reading, writing = os.pipe()
    environment = dict(os.environ)
    environment.pop("OMP_NUM_THREADS", None)  # Ray sets it to the number of CPUs of a worker: 1
    environment |= {**spec.environment, **variables}
    environment[VARIABLE] = f"{writing}:{os.getpid()}"
    environment.pop("RAY_AUTH_TOKEN", None)
    try:
        child = subprocess.Popen(  # noqa: S603 - our own program, and the user's own arguments
            [*own_command(), *spec.arguments],
            cwd=spec.folder,
            env=environment,
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
            child.stdout.fileno(): MessageKind.STDOUT,
            child.stderr.fileno(): MessageKind.STDERR,
            heartbeat.fileno(): MessageKind.HEARTBEAT,
        }
        yield child, _Pipes(pipes)


class _Pipes:
    """Reads the pipes of a process.

    Args:
        kinds: kind of the messages from each pipe, by file descriptor.
    """

    def __init__(self, kinds: dict[int, MessageKind]) -> None:
        self._selector = selectors.DefaultSelector()
        for pipe, kind in kinds.items():
            os.set_blocking(pipe, False)
            self._selector.register(pipe, selectors.EVENT_READ, kind)

    def read(self, seconds: float) -> Iterator[tuple[MessageKind, bytes]]:
        """Yield what is in the pipes, and what arrives within ``seconds``."""
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
