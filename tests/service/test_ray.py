"""Jobs on a real Ray cluster of two nodes: the same contract as on this machine."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import EnvironmentFaultError
from finetune.service.settings import ServiceSettings
from finetune.service.store import jobs as jobs_module
from finetune.service.work import dispatcher
from finetune.service.work.ray_executor import TOKEN_VARIABLE, RayExecutor
from tests.conftest import draw_folder
from tests.launch.ray.cluster import two_nodes
from tests.service.servers import Served, serving
from tests.service.test_chaos import free_port

pytestmark = pytest.mark.ray
PATIENCE = 300


@pytest.fixture(scope="module")
def address(own_cache: None) -> Iterator[str]:
    pytest.importorskip("ray.dashboard", reason="Ray is not installed: pip install 'ray[default]'")
    port = free_port()
    before = os.environ.get(TOKEN_VARIABLE)
    with two_nodes(port) as environment:
        os.environ[TOKEN_VARIABLE] = environment[TOKEN_VARIABLE]
        yield f"http://127.0.0.1:{port}"
    os.environ.pop(TOKEN_VARIABLE)
    if before is not None:
        os.environ[TOKEN_VARIABLE] = before


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return draw_folder(tmp_path / "data", {"red": 24, "blue": 24})


@pytest.fixture(autouse=True)
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "LEASE", 3.0)
    monkeypatch.setattr(dispatcher, "LEASE", 3.0)


@contextmanager
def on_cluster(address: str, data: Path) -> Iterator[Served]:
    settings = ServiceSettings(data.parent / "store", data_roots=(data,))
    with serving(settings, RayExecutor(address, 2, 0.0)) as served:
        yield served


def submit(served: Served, data: Path, epochs: int, **more: Any) -> str:
    recipe: Mapping[str, Any] = {
        "data": {"path": str(data), "workers": 0},
        "backbone": {"name": "timm/test_vit", "weights": None},
        "strategy": {"name": "scratch"},
        "input": {"img_size": 32},
        "training": {"epochs": epochs, "batch_size": 8},
    }
    answer = served.client.post("/v1/jobs", json=recipe | more)
    assert answer.status_code == 201, answer.text
    job: str = answer.json()["id"]
    return job


def wait_until_training(served: Served, data: Path, job: str) -> None:
    """Wait until there is a checkpoint to go on from."""
    checkpoints = data.parent / "store" / "jobs" / job / "run" / "checkpoints"
    deadline = time.monotonic() + PATIENCE
    while not any(checkpoints.glob("*")):
        assert time.monotonic() < deadline, served.client.get(f"/v1/jobs/{job}").json()
        time.sleep(0.1)


def worker_of(job: str) -> int:
    """The process of the job's run, below its supervisor."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if f"/jobs/{job}/run".encode() in words and b"-m\0finetune" in words:
            found.append(int(folder.name))
    return max(found)


def test_a_job_of_the_cluster_is_a_job(address: str, data: Path) -> None:
    with on_cluster(address, data) as served:
        job = submit(served, data, 2)
        ended = served.wait(job, "succeeded", "failed", seconds=PATIENCE)
        assert ended["state"] == "succeeded", (ended, served.client.get(f"/v1/jobs/{job}/logs").text)
        assert ended["metrics"]["num_classes"] == 2 and ended["attempt"] == 1
        assert "report" in served.client.get(f"/v1/jobs/{job}/logs").text
        refused = submit(served, data, 2, backbone={"name": "no/network"})
        failed = served.wait(refused, "failed", seconds=PATIENCE)
        assert failed["outcome"]["exit_code"] == 2 and failed["attempt"] == 1, failed


def test_cancelled_and_resumed(address: str, data: Path) -> None:
    with on_cluster(address, data) as served:
        job = submit(served, data, 60)
        wait_until_training(served, data, job)
        served.client.post(f"/v1/jobs/{job}/cancel")
        assert served.wait(job, "cancelled", seconds=PATIENCE)["outcome"]["exit_code"] == 75
        served.client.post(f"/v1/jobs/{job}/resume")
        ended = served.wait(job, "succeeded", "failed", seconds=PATIENCE)
        assert ended["state"] == "succeeded" and ended["attempt"] == 2, ended
        assert "resum" in served.client.get(f"/v1/jobs/{job}/logs").text


def test_a_job_outlives_its_server(address: str, data: Path) -> None:
    with on_cluster(address, data) as served:
        job = submit(served, data, 60)
        wait_until_training(served, data, job)
    with on_cluster(address, data) as served:
        ended = served.wait(job, "succeeded", "failed", seconds=PATIENCE)
        assert ended["state"] == "succeeded", ended
    outcome = json.loads((data.parent / "store" / "jobs" / job / "run" / "outcome.json").read_text())
    assert outcome["attempt"] == 1  # one process did all of it


def test_a_killed_process_is_tried_again(address: str, data: Path) -> None:
    with on_cluster(address, data) as served:
        job = submit(served, data, 60)
        wait_until_training(served, data, job)
        os.kill(worker_of(job), signal.SIGKILL)
        ended = served.wait(job, "succeeded", "failed", seconds=PATIENCE)
        assert ended["state"] == "succeeded", ended


def test_a_cluster_that_is_not_there_is_said() -> None:
    with pytest.raises(EnvironmentFaultError, match="Ray cluster"):
        RayExecutor("http://127.0.0.1:9", 1, 0.0)


def test_a_wrong_token_is_said(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "wrong" * 8)
    with pytest.raises(EnvironmentFaultError, match=r"40[13]"):
        RayExecutor(address, 1, 0.0)
