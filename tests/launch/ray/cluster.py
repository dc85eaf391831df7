"""A Ray cluster of two nodes on this machine, for tests: two raylets that see one processor each."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAM = str(Path(sys.executable).with_name("ray"))  # an environment need not be activated
RAY = [PROGRAM, "start", "--block", "--num-cpus", "1", "--num-gpus", "0", "--disable-usage-stats"]
_PATIENCE = 180


@contextmanager
def two_nodes(dashboard: int | None = None) -> Iterator[Mapping[str, str]]:
    """Yield the environment of a command that is to run on the cluster; nothing of it is left afterwards.

    Args:
        dashboard: port of the dashboard, which takes jobs; None for no dashboard.
    """
    home = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # a socket's path must be short
    port = _free_port()
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": uuid.uuid4().hex,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_JOB_STOP_WAIT_TIME_S": "120",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(home),
    }
    address = f"127.0.0.1:{port}"
    head = ["--head", f"--port={port}", f"--temp-dir={home}/ray"]
    head += [f"--include-dashboard={str(dashboard is not None).lower()}"]
    head += [] if dashboard is None else ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    nodes = []
    try:
        nodes.append(_start([*RAY, *head, "--node-ip-address=127.0.0.1"], environment, home / "head.log"))
        _wait_for(home / "head.log", nodes[0])
        more = [f"--address={address}", "--node-ip-address=127.0.0.1"]
        nodes.append(_start([*RAY, *more], environment, home / "second.log"))
        _wait_for(home / "second.log", nodes[1])
        yield environment | {"RAY_ADDRESS": address}
    finally:
        for node in reversed(nodes):
            _end(node)
        shutil.rmtree(home, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _start(command: list[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as stream:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait_for(log: Path, node: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while b"Ray runtime started" not in log.read_bytes():
        assert node.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def _end(node: subprocess.Popen[bytes]) -> None:
    """`ray start --block` ends its children when it is asked to; what is left of its group is killed."""
    node.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        node.wait(30)
    with suppress(ProcessLookupError):
        os.killpg(node.pid, signal.SIGKILL)
    node.wait()
