"""Data sets over HTTP: whole or in parts, the same content once, checked before a job may use them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import os
import resource
import signal
import tarfile
import time
import zipfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from finetune.errors import DiskError
from finetune.service.settings import Limits, ServiceSettings
from finetune.service.store.jobs import UnknownError
from finetune.service.store.uploads import Uploads
from finetune.service.work import dispatcher
from finetune.service.work.executor import LocalExecutor
from tests.conftest import draw_folder
from tests.service.servers import Scripts, Served, serving
from tests.service.test_api import problem

REFUSED = """printf '{"errors": 2, "warnings": 0, "findings": [
{"severity": "error", "message": "only one class", "fix": "Add another."},
{"severity": "error", "message": "x", "fix": "y"}]}' > $OUT/check.json; exit 65"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "TICK", 0.02)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    settings = ServiceSettings(tmp_path / "store", limits=Limits(upload_bytes=100_000))
    with serving(settings) as server:
        yield server


def pack(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in (files or {"a/1.png": b"x", "b/1.png": b"y"}).items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def wait(served: Served, dataset: str, *states: str, seconds: float = 60) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while True:
        found: dict[str, Any] = served.client.get(f"/v1/datasets/{dataset}").json()
        if found["state"] in states:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.02)


def test_an_archive_in_one_request_is_checked_and_used(served: Served, tmp_path: Path) -> None:
    content = pack()
    answer = served.client.post("/v1/datasets", content=content, params={"name": "ants"})
    assert answer.status_code == 201 and answer.json()["id"] == hashlib.sha256(content).hexdigest()
    dataset = answer.json()["id"]
    ready = wait(served, dataset, "ready")
    assert ready["name"] == "ants" and ready["num_bytes"] == len(content)
    assert served.client.get(f"/v1/datasets/{dataset}/check").json()["warnings"] == 1
    problem(served.client.get(f"/v1/datasets/{dataset}/check.png"), 404)
    job = served.client.post("/v1/jobs", json={"data": ready["data"]})
    assert job.status_code == 201
    path = Path(job.json()["recipe"]["data"]["path"])
    assert path.name == "images.zip" and path.read_bytes() == content
    again = served.client.post("/v1/datasets", content=content)
    assert again.status_code == 200 and again.json()["id"] == dataset
    assert len(served.client.get("/v1/datasets").json()["datasets"]) == 1
    assert served.client.get("/v1/jobs").json()["jobs"][0]["id"] == job.json()["id"]  # no checks among them
    assert served.client.delete(f"/v1/datasets/{dataset}").status_code == 204
    problem(served.client.get(f"/v1/datasets/{dataset}"), 404)
    assert not path.exists() and not list((tmp_path / "store" / "uploads").iterdir())


def test_a_tar_is_one_too(served: Served) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        info = tarfile.TarInfo("a/1.png")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"x"))
    assert served.client.post("/v1/datasets", content=buffer.getvalue()).status_code == 201


def test_a_job_on_refused_data_is_refused_with_what_was_found(served: Served) -> None:
    served.scripts.scripts["check"] = REFUSED
    dataset = served.client.post("/v1/datasets", content=pack()).json()["id"]
    refused = wait(served, dataset, "refused")
    assert refused["outcome"]["message"] == "only one class (and 1 more)"
    answer = served.client.post("/v1/jobs", json={"data": {"path": f"dataset:{dataset}"}})
    said = problem(answer, 422)
    assert said["class"] == "data" and "only one class" in said["detail"] and "Add another." in said["fix"]


def test_an_upload_goes_on_where_it_was_cut_off(served: Served) -> None:
    content = pack(**{f"{label}/{n}.png": bytes(500) for label in "ab" for n in range(20)})
    name = base64.b64encode(b"bees.zip").decode()
    begun = served.client.post(
        "/v1/uploads", headers={"Upload-Length": str(len(content)), "Upload-Metadata": f"filename {name},x"}
    )
    assert begun.status_code == 201 and begun.headers["tus-resumable"] == "1.0.0"
    address = begun.headers["location"]
    upload = address.rpartition("/")[2]
    kind = {"Content-Type": "application/offset+octet-stream"}
    problem(served.client.post("/v1/datasets", params={"upload": upload}), 409)

    def cut_off() -> Iterator[bytes]:
        yield content[:3000]
        time.sleep(1.0)  # a server drops what it has not read yet when its client is gone
        raise OSError("the network is gone")

    with pytest.raises(OSError, match="gone"):
        served.client.patch(address, content=cut_off(), headers=kind | {"Upload-Offset": "0"})
    deadline = time.monotonic() + 10
    while (done := int(served.client.head(address).headers["upload-offset"])) == 0:
        assert time.monotonic() < deadline
    assert done == 3000
    wrong = served.client.patch(address, content=b"x", headers=kind | {"Upload-Offset": "0"})
    assert "3000 bytes are there" in problem(wrong, 409)["detail"]
    for start in range(done, len(content), 5000):
        part = content[start : start + 5000]
        sent = served.client.patch(address, content=part, headers=kind | {"Upload-Offset": str(start)})
        assert sent.status_code == 204 and int(sent.headers["upload-offset"]) == start + len(part)
    made = served.client.post("/v1/datasets", params={"upload": upload})
    assert made.status_code == 201 and made.json()["id"] == hashlib.sha256(content).hexdigest()
    assert made.json()["name"] == "bees.zip"
    assert served.client.head(address).status_code == 404


def test_what_uploads_refuse(served: Served) -> None:
    problem(served.client.post("/v1/uploads", headers={"Upload-Length": "100001"}), 413)
    problem(served.client.post("/v1/uploads", headers={"Upload-Length": "0"}), 422)
    problem(served.client.post("/v1/uploads"), 422)
    address = served.client.post("/v1/uploads", headers={"Upload-Length": "3"}).headers["location"]
    kind = {"Content-Type": "application/offset+octet-stream", "Upload-Offset": "0"}
    problem(served.client.patch(address, content=b"abc", headers={"Upload-Offset": "0"}), 415)
    problem(served.client.patch(address, content=b"abcd", headers=kind), 413)
    for unknown in ("0" * 32, "..%2f..%2fstore", "x"):
        problem(served.client.patch(f"/v1/uploads/{unknown}", content=b"a", headers=kind), 404)
    assert served.client.options("/v1/uploads").headers["tus-max-size"] == "100000"
    assert served.client.delete(address).status_code == 204
    problem(served.client.delete(address), 404)


def test_uploads_that_were_given_up_are_removed_and_no_others(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path, 100)
    old, new = uploads.create(10), uploads.create(10)
    os.utime(uploads.path(old.id), (1, 1))
    uploads.remove_old()
    assert uploads.get(new.id) == (new, 0)
    with pytest.raises(UnknownError):
        uploads.get(old.id)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"", 422, "it is empty"),
        (b"hello", 422, "neither a zip nor a tar"),
        (b"x" * 100_001, 413, "100,001 bytes"),
    ],
)
def test_what_is_no_archive_leaves_nothing(
    served: Served, tmp_path: Path, content: bytes, status: int, words: str
) -> None:
    answer = served.client.post("/v1/datasets", content=content)
    assert words in problem(answer, status)["detail"]
    assert served.client.get("/v1/datasets").json()["datasets"] == []
    uploads = tmp_path / "store" / "uploads"
    assert not uploads.exists() or not list(uploads.iterdir())


def test_a_digest_that_differs_is_refused(served: Served) -> None:
    content = pack()
    good = base64.b64encode(hashlib.sha256(content).digest()).decode()
    bad = base64.b64encode(bytes(32)).decode()
    answer = served.client.post("/v1/datasets", content=content, headers={"Repr-Digest": f"sha-256=:{bad}:"})
    problem(answer, 422)
    answer = served.client.post("/v1/datasets", content=content, headers={"Repr-Digest": f"sha-256=:{good}:"})
    assert answer.status_code == 201


def test_a_body_of_unknown_length_is_refused(served: Served) -> None:
    problem(served.client.post("/v1/datasets", content=iter([b"abc"])), 411)


class RealChecks(Scripts):
    """Checks are real, jobs are scripts."""

    slots = 1

    def start(self, job: Any, folder: Any) -> Any:
        from finetune.service.store.states import Kind

        return self._local.start(job, folder) if job.kind == Kind.CHECK else super().start(job, folder)

    def __init__(self) -> None:
        super().__init__()
        self._local = LocalExecutor()


@pytest.mark.slow
def test_the_check_is_that_of_the_command(tmp_path: Path) -> None:
    draw_folder(tmp_path / "images", {"red": 12, "blue": 12})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in sorted((tmp_path / "images").rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(tmp_path / "images"))
    settings = ServiceSettings(tmp_path / "store")
    with serving(settings, RealChecks()) as served:
        good = served.client.post("/v1/datasets", content=buffer.getvalue()).json()["id"]
        bad = served.client.post("/v1/datasets", content=pack(**{"a/1.png": b"no image"})).json()["id"]
        assert wait(served, good, "ready", "refused")["state"] == "ready"
        assert served.client.get(f"/v1/datasets/{good}/check").json()["errors"] == 0
        refused = wait(served, bad, "refused", "ready")
        assert refused["state"] == "refused" and refused["outcome"]["class"] == "data"


def test_the_limit_of_the_settings_holds_for_the_service(tmp_path: Path) -> None:
    settings = ServiceSettings(tmp_path / "store")
    small = replace(settings, limits=Limits(upload_bytes=10))
    with serving(small) as served:
        answer = httpx.post(f"{served.client.base_url}/v1/datasets", content=b"x" * 11)
        problem(answer, 413)


def test_a_full_disk_is_said_and_the_upload_goes_on_later(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path, 10**9)
    begun = uploads.create(3_000_000)

    async def send(start: int) -> int:
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(start, 3_000_000, 100_000):
                yield bytes(100_000)

        return await uploads.append(begun.id, start, chunks())

    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_050_000, limits[1]))
    try:
        with pytest.raises(DiskError):
            asyncio.run(send(0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    _, done = uploads.get(begun.id)
    assert done == 1_050_000
    assert asyncio.run(uploads.append(begun.id, done, _once(bytes(3_000_000 - done)))) == 3_000_000


async def _once(content: bytes) -> AsyncIterator[bytes]:
    yield content
