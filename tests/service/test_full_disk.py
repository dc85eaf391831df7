"""The store on a full disk: requests say so, nothing that was stored is lost, and it goes on afterwards."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.service.test_chaos import RECIPE, ROOT, free_port

MOUNT = 'mount -t tmpfs -o size=4m tmpfs "$1" && shift && exec "$@"'
"""A disk of its own, which only the server's process sees."""


class FullDiskServer:
    """A server of a process of its own whose store is on a small disk."""

    def __init__(self, store: Path) -> None:
        store.mkdir()
        port = free_port()
        server = [sys.executable, "-m", "tests.service.chaos_server", str(store), "", str(port)]
        words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", MOUNT, "sh", str(store)]
        self.process = subprocess.Popen(words + server, cwd=ROOT)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        self.store = Path(f"/proc/{self.process.pid}/root{store}")
        self._filler = self.store / "filler"

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if self.client.get("/v1/readyz").status_code == 200:
                    return
            time.sleep(0.1)
        raise AssertionError

    def wait_for(self, job: str, state: str) -> None:
        deadline = time.monotonic() + 60
        while (found := self.client.get(f"/v1/jobs/{job}").json())["state"] != state:
            assert time.monotonic() < deadline, found
            time.sleep(0.05)

    def fill(self) -> None:
        with contextlib.suppress(OSError), self._filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**12))

    def free(self) -> None:
        self._filler.unlink()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FullDiskServer]:
    trial = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    if shutil.which("unshare") is None or subprocess.run(trial, check=False, capture_output=True).returncode:
        pytest.skip("this machine mounts no disk for a test")
    one = FullDiskServer(tmp_path / "store")
    try:
        one.wait_until_ready()
        yield one
    finally:
        one.process.terminate()
        one.process.wait(60)


def submit(server: FullDiskServer, key: str) -> httpx.Response:
    return server.client.post("/v1/jobs", json=RECIPE | {"seed": 1}, headers={"Idempotency-Key": key})


@pytest.mark.slow
def test_what_is_stored_stays_and_what_is_refused_is_not_half_there(server: FullDiskServer) -> None:
    first = submit(server, "first").json()["id"]
    server.wait_for(first, "succeeded")
    before = server.client.get(f"/v1/jobs/{first}/events").json()
    server.fill()
    accepted = {}
    for number in range(100):  # the journal of the database has some room left
        answer = submit(server, f"more {number}")
        if answer.status_code != 201:
            break
        accepted[f"more {number}"] = answer.json()["id"]
    assert answer.status_code == 507, answer.text
    assert answer.json()["class"] == "disk" and "Free some space" in answer.json()["fix"]
    assert server.client.get(f"/v1/jobs/{first}/events").json() == before
    listed = {job["id"] for job in server.client.get("/v1/jobs", params={"limit": 500}).json()["jobs"]}
    assert listed == {first, *accepted.values()}

    server.free()
    last = submit(server, f"more {len(accepted)}")
    assert last.status_code == 201
    server.wait_for(last.json()["id"], "succeeded")
    for key, job in accepted.items():
        assert submit(server, key).json()["id"] == job
