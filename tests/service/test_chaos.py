"""Kills at random instants: of servers, of jobs, of the database. No job is lost, none has two results."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from finetune.service import client as client_module
from finetune.service.client import Client
from tests.service.databases import Postgres, find_postgres, running_postgres
from tests.sweeps import slow_except

ROOT = Path(__file__).parents[2]
RECIPE = {"data": {"path": "sample:digits"}}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


class Servers:
    """Servers of one store, each in a process that may be killed and is then started again."""

    def __init__(self, store: Path, database: str, number: int) -> None:
        self._store, self._database = store, database
        self.ports = [free_port() for _ in range(number)]
        self._processes = [self._start(port) for port in self.ports]

    def _start(self, port: int) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "tests.service.chaos_server",
            str(self._store),
            self._database,
            str(port),
        ]
        with (self._store.parent / f"server-{port}.log").open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

    def kill(self, index: int) -> None:
        self._processes[index].kill()
        self._processes[index].wait()
        self._processes[index] = self._start(self.ports[index])

    def start_ended(self) -> None:
        """Start again what ended by itself, as systemd would: a server that finds no database at first."""
        for index, process in enumerate(self._processes):
            if process.poll() is not None:
                self._processes[index] = self._start(self.ports[index])

    def wait_for_one(self) -> None:
        """Wait until a server answers: on a busy machine one starts more slowly than the test kills."""
        deadline = time.monotonic() + 120
        while True:
            for port in self.ports:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"http://127.0.0.1:{port}/v1/healthz", timeout=5).status_code == 200:
                        return
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def jobs(self) -> list[int]:
        """The processes of jobs, which are children of the servers."""
        found = []
        for process in self._processes:
            with contextlib.suppress(OSError):
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                found += [int(pid) for pid in children]
            for task in Path(f"/proc/{process.pid}/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    found += [int(pid) for pid in task.read_text().split()]
        return sorted(set(found))

    def stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()


@pytest.fixture(params=slow_except(["sqlite"], ["sqlite", "postgres"]))
def database(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Postgres | None]:
    import tempfile

    if request.param == "sqlite":
        yield None
        return
    if find_postgres() is None:
        pytest.skip("there is no PostgreSQL server on this machine")
    with tempfile.TemporaryDirectory() as folder, running_postgres(Path(folder)) as server:
        yield server


class Submitter(threading.Thread):
    """Submits jobs, each with a key of its own, through whichever server answers."""

    def __init__(self, ports: list[int], number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self._ports, self._number = ports, number
        self.jobs: dict[int, str] = {}
        self.errors: list[Exception] = []

    def run(self) -> None:
        for seed in range(1, self._number + 1):
            try:
                self.jobs[seed] = self._submit(seed)
            except Exception as error:
                self.errors.append(error)
                return

    def _submit(self, seed: int) -> str:
        deadline = time.monotonic() + 120
        while True:
            for port in random.sample(self._ports, len(self._ports)):
                with contextlib.suppress(httpx.TransportError):
                    answer = httpx.post(
                        f"http://127.0.0.1:{port}/v1/jobs",
                        json=RECIPE | {"seed": seed},
                        headers={"Idempotency-Key": f"job {seed}"},
                        timeout=10,
                    )
                    if answer.status_code in (200, 201):
                        job: str = answer.json()["id"]
                        return job
                    assert answer.status_code == 503, answer.text
            assert time.monotonic() < deadline
            time.sleep(0.1)


def expected(seed: int) -> str:
    content = "".join(f"{number}\n" for number in range(1, 30 * seed + 1))
    return hashlib.sha256(content.encode()).hexdigest()


@pytest.mark.parametrize("kills", slow_except([5], [5, 220]))
def test_kills_lose_no_job_and_give_no_job_two_results(
    database: Postgres | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int
) -> None:
    number, dice = kills, random.Random(kills)
    store = tmp_path / "store"
    servers = Servers(store, database.address if database else "", 2)
    submitter = Submitter(servers.ports, number, monkeypatch)
    submitter.start()
    try:
        for count in range(kills):
            time.sleep(dice.uniform(0.05, 1.0))
            chosen = dice.random()
            if database is not None and chosen < 0.05:
                database.stop()
                time.sleep(dice.uniform(0, 1.0))
                database.start()
            elif chosen < 0.4 or not (running := servers.jobs()):
                servers.kill(count % 2)
                if dice.random() < 0.8:  # else the next kill meets servers that are just starting
                    servers.wait_for_one()
            else:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(dice.choice(running), signal.SIGKILL)
            servers.start_ended()
        submitter.join()
        assert not submitter.errors and len(submitter.jobs) == number
        monkeypatch.setattr(client_module, "POLL", 0.1)
        monkeypatch.setenv("FINETUNE_API_URL", f"http://127.0.0.1:{servers.ports[0]}")
        monkeypatch.setattr(client_module, "TRIES", 20)  # it may be starting
        client = Client(tmp_path / "unused")
        check_all(client, submitter.jobs)
    finally:
        servers.stop()


def check_all(client: Client, jobs: dict[int, str]) -> None:
    assert len(set(jobs.values())) == len(jobs)
    for seed, job in jobs.items():
        events: list[dict[str, Any]] = list(client.follow_events(job))
        assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
        assert events[0]["state"] == "queued" and events[-1]["state"] == "succeeded", events[-3:]
        assert [event["state"] for event in events].count("succeeded") == 1
        attempts = [event["attempt"] for event in events if event["state"] == "running"]
        assert attempts == list(range(1, len(attempts) + 1))
        files = {one["name"]: one["sha256"] for one in client.read(f"/v1/jobs/{job}/artifacts")["artifacts"]}
        assert files["model/model.safetensors"] == expected(seed)
        again = client.submit(RECIPE | {"seed": seed}, f"job {seed}")
        assert again["id"] == job  # and the key still means it
    assert len(client.read("/v1/jobs", params={"limit": 500})["jobs"]) == len(jobs)
