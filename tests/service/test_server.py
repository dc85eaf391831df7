"""``finetune serve`` as a process: it says where it is, ends on a signal, and leaves its jobs in order."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from finetune.service.settings import TOKEN_VARIABLE
from tests.service.servers import RECIPE


class Process:
    """A server in a process; its address is known once it listens."""

    def __init__(self, store: Path, *words: object) -> None:
        command = [sys.executable, "-m", "finetune", "serve", "--store", str(store), "--port", "0"]
        environment = {name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE}
        self.process = subprocess.Popen(
            [*command, *map(str, words)], stderr=subprocess.PIPE, text=True, env=environment
        )
        self.lines: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"http://\S+", line):
                self.address = found.group()
                break
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines += list(self.process.stderr)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Process]:
    started = Process(tmp_path / "store")
    yield started
    started.process.kill()
    started.process.wait()


@pytest.mark.slow
def test_a_signal_ends_it_although_a_client_reads_a_stream(server: Process) -> None:
    job = httpx.post(f"{server.address}/v1/jobs", json=RECIPE | {"seed": 1}, timeout=60).json()["id"]
    seen: list[str] = []

    def read() -> None:
        accept = {"Accept": "text/event-stream"}
        address = f"{server.address}/v1/jobs/{job}/events"
        try:
            with httpx.stream("GET", address, headers=accept, timeout=60) as answer:
                seen.extend(answer.iter_lines())
        except httpx.TransportError:
            seen.append("closed")

    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(1.0)
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(90) == 0
    reader.join(30)
    assert time.monotonic() - began < 60 and not reader.is_alive()
    assert any("stopped" in line for line in server.lines)
    assert not any("Traceback" in line for line in server.lines), server.lines


@pytest.mark.slow
def test_a_port_that_is_taken_is_refused(server: Process, tmp_path: Path) -> None:
    port = server.address.rpartition(":")[2]
    command = [sys.executable, "-m", "finetune", "serve", "--store", str(tmp_path / "b"), "--port", port]
    done: Any = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 78 and "cannot be used" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_dry_run_gives_the_plan_and_stores_nothing(server: Process) -> None:
    with httpx.Client(base_url=server.address, timeout=300) as client:
        answer = client.post("/v1/jobs", json=RECIPE, params={"dry_run": True})
        assert answer.status_code == 200, answer.text
        expected = subprocess.run(
            [sys.executable, "-m", "finetune", "run", "--data", "sample:digits", "--dry-run", "--json"],
            capture_output=True,
            check=True,
        )
        facts = json.loads(expected.stdout)
        assert answer.json().keys() == facts.keys() - {"output"} and answer.json()["plan"] == facts["plan"]
        refused = client.post("/v1/jobs", json={"data": {"path": "sample:none"}}, params={"dry_run": True})
        assert refused.status_code == 422 and "no sample of this name" in refused.json()["detail"]
        assert client.get("/v1/jobs").json()["jobs"] == []
