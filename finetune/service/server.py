"""Start a server and keep it running until it is asked to stop."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from finetune.errors import EnvironmentFaultError
from finetune.service.app import create_app
from finetune.service.settings import ServiceSettings
from finetune.service.work.executor import Executor, LocalExecutor, find_gpus
from finetune.service.work.ray_executor import RayExecutor

CLOSE_SECONDS = 5
"""Seconds after a signal in which requests under way are answered."""


def serve(settings: ServiceSettings, say: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; jobs that run then write a checkpoint, and the next server resumes them.

    Args:
        settings: what the server is started with.
        say: shows one line to the user.

    Raises:
        UsageError: others reach the address, and there is no token.
        EnvironmentFaultError: the port is taken, or the database is not reached.
        DiskError: the store cannot be written.
    """
    settings.check()
    executor = _open_executor(settings)
    app = create_app(settings, executor, say)
    with _listen(settings) as listener:
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        say(f"serving on http://{shown}:{port} (store {settings.store}, slots {executor.slots})")
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=CLOSE_SECONDS,
        )
        _Server(config, app.state.context.closing).run(sockets=[listener])
    say("stopped")


class _Server(uvicorn.Server):
    """A server that a signal stops, and that then returns: uvicorn's own would raise the signal once more."""

    def __init__(self, config: uvicorn.Config, closing: threading.Event) -> None:
        super().__init__(config)
        self._closing = closing

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, and let the streams end."""
        self._closing.set()
        super().handle_exit(sig, frame)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on SIGINT and SIGTERM while the block runs."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _open_executor(settings: ServiceSettings) -> Executor:
    if settings.ray_address:
        return RayExecutor(settings.ray_address, settings.slots or 1, settings.gpus_per_job)
    return LocalExecutor(settings.slots, find_gpus())


def _listen(settings: ServiceSettings) -> socket.socket:
    asked = f"--host {settings.host} --port {settings.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)  # from here on a client waits instead of being refused
    except OSError as error:
        found = f"it cannot be used ({error.strerror or os.strerror(error.errno or 0)})"
        raise EnvironmentFaultError(asked, found, "Take another --port or --host.") from None
    return listener
