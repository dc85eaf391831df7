"""The dispatcher, with real processes of the shell in place of runs: every end of a process has its state."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.service.settings import SECRETS
from finetune.service.store.folder import JobFolder, StoreFolder
from finetune.service.store.jobs import Job, JobStore
from finetune.service.store.states import State
from finetune.service.store.tables import open_store
from finetune.service.work import dispatcher as module
from finetune.service.work.dispatcher import Dispatcher
from finetune.service.work.executor import LocalExecution, LocalExecutor


class ShellExecutor:
    """Runs the script that a job has in place of a recipe; ``$OUT`` is its run folder."""

    slots = 2

    def start(self, job: Job, folder: JobFolder) -> LocalExecution:
        folder.run.path.mkdir(parents=True, exist_ok=True)
        script = str(job.recipe["script"])
        environment = {"OUT": str(folder.run.path), "ATTEMPT": str(job.attempt), "PATH": "/usr/bin:/bin"}
        process = subprocess.Popen(["sh", "-c", script], env=environment, start_new_session=True)
        return LocalExecution(process, None)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    engine = open_store(str(tmp_path / "store"))
    yield JobStore(engine)
    engine.dispose()


@pytest.fixture
def dispatcher(
    store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], Dispatcher]]:
    """Start dispatchers; they are stopped at the end."""
    monkeypatch.setattr(module, "TICK", 0.02)
    monkeypatch.setattr(module, "WAITS", (0.05, 0.05))
    started: list[Dispatcher] = []

    def start() -> Dispatcher:
        started.append(Dispatcher(store, StoreFolder(tmp_path / "store"), ShellExecutor(), lambda _: None))
        started[-1].start()
        return started[-1]

    yield start
    for one in started:
        one.stop()


def wait_for(store: JobStore, job: str, *states: State, seconds: float = 60) -> Job:
    deadline = time.monotonic() + seconds
    while (found := store.get(job)).state not in states:
        assert time.monotonic() < deadline, f"{found.state}: {store.list_events(job)}"
        time.sleep(0.02)
    return found


def submit(store: JobStore, script: str) -> str:
    return store.submit({"script": script})[0].id


def write_outcome(**facts: Any) -> str:
    return f"printf '%s' '{json.dumps({'state': 'failed', 'message': 'm'} | facts)}' > $OUT/outcome.json; "


@pytest.mark.parametrize(
    ("script", "state", "attempts"),
    [
        ("exit 0", State.SUCCEEDED, 1),
        (write_outcome(exit_code=65, retryable=False) + "exit 65", State.FAILED, 1),
        (write_outcome(exit_code=74, retryable=True) + "exit 74", State.FAILED, 3),  # a disk may get room
        (write_outcome(exit_code=0, retryable=True) + "exit 3", State.FAILED, 1),  # of another attempt
        ("kill -9 $$", State.FAILED, 3),
        ("[ $ATTEMPT = 3 ] || kill -9 $$", State.SUCCEEDED, 3),
        ("[ $ATTEMPT = 2 ] || exit 75", State.SUCCEEDED, 2),
    ],
)
def test_the_end_of_a_process_decides(
    store: JobStore, dispatcher: Callable[[], Dispatcher], script: str, state: State, attempts: int
) -> None:
    job = submit(store, script)
    dispatcher()
    found = wait_for(store, job, State.SUCCEEDED, State.FAILED)
    assert (found.state, found.attempt) == (state, attempts)
    assert found.outcome is not None and found.outcome["message"]


def test_a_job_that_cannot_be_started_is_tried_again(
    store: JobStore, dispatcher: Callable[[], Dispatcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    start, faults = ShellExecutor.start, [OSError("no memory"), IndexError("a bug")]

    def fail(self: ShellExecutor, job: Job, folder: JobFolder) -> LocalExecution:
        if faults:
            raise faults.pop(0)
        return start(self, job, folder)

    monkeypatch.setattr(ShellExecutor, "start", fail)
    job = submit(store, "exit 0")
    dispatcher()
    assert wait_for(store, job, State.SUCCEEDED).attempt == 3


def test_no_more_jobs_run_than_there_are_slots(
    store: JobStore, dispatcher: Callable[[], Dispatcher], tmp_path: Path
) -> None:
    go = tmp_path / "go"
    jobs = [submit(store, f"while [ ! -e {go} ]; do sleep 0.05; done") for _ in range(5)]
    dispatcher()
    for _ in range(30):
        assert sum(store.get(job).state == State.RUNNING for job in jobs) <= 2
        time.sleep(0.02)
    assert sum(store.get(job).state == State.RUNNING for job in jobs) == 2
    go.touch()
    for job in jobs:
        wait_for(store, job, State.SUCCEEDED)


def test_a_running_job_is_cancelled_and_resumed(
    store: JobStore, dispatcher: Callable[[], Dispatcher], tmp_path: Path
) -> None:
    job = submit(
        store, f"trap 'exit 75' TERM; [ $ATTEMPT = 2 ] || while :; do sleep 0.05; done; touch {tmp_path}/x"
    )
    dispatcher()
    wait_for(store, job, State.RUNNING)
    time.sleep(0.3)
    store.cancel(job)
    wait_for(store, job, State.CANCELLED)
    assert not (tmp_path / "x").exists()
    store.resume(job)
    wait_for(store, job, State.SUCCEEDED)
    assert (tmp_path / "x").exists()


def test_a_server_that_stops_leaves_its_jobs_to_the_next(
    store: JobStore, dispatcher: Callable[[], Dispatcher]
) -> None:
    job = submit(store, "trap 'exit 75' TERM; [ $ATTEMPT = 2 ] || while :; do sleep 0.05; done")
    first = dispatcher()
    wait_for(store, job, State.RUNNING)
    time.sleep(0.3)
    first.stop()
    assert store.get(job).state == State.RETRYING and not first.is_alive
    dispatcher()
    assert wait_for(store, job, State.SUCCEEDED).attempt == 2


def test_a_job_that_was_lost_to_another_server_is_stopped(
    store: JobStore, dispatcher: Callable[[], Dispatcher], tmp_path: Path
) -> None:
    job = submit(store, f"trap 'touch {tmp_path}/stopped; exit 75' TERM; while :; do sleep 0.05; done")
    first = dispatcher()
    wait_for(store, job, State.RUNNING)
    time.sleep(0.3)
    claimed = store.get(job)
    assert store.finish(claimed, State.RETRYING, {"message": "taken by hand"}, wait=3600)
    deadline = time.monotonic() + 30
    while not (tmp_path / "stopped").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.stop()
    assert store.get(job).state == State.RETRYING


def test_a_job_of_a_cluster_outlives_its_server(
    store: JobStore, dispatcher: Callable[[], Dispatcher], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(LocalExecution, "ends_with_server", False)
    job = submit(store, f"while [ ! -e {tmp_path}/go ]; do sleep 0.05; done; touch {tmp_path}/done")
    first = dispatcher()
    wait_for(store, job, State.RUNNING)
    time.sleep(0.3)
    first.stop()
    assert store.get(job).state == State.RUNNING
    (tmp_path / "go").touch()
    deadline = time.monotonic() + 30
    while not (tmp_path / "done").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_jobs_get_none_of_the_secrets_of_the_server(
    store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, str]] = []
    for name in SECRETS:
        monkeypatch.setenv(name, "secret")
    monkeypatch.setattr(subprocess, "Popen", lambda *_, env, **__: given.append(env))
    store.submit({"data": {"path": "sample:digits"}})
    job = store.claim("s")
    assert job is not None
    LocalExecutor(gpus=["3"]).start(job, StoreFolder(tmp_path).job(job.id))
    assert given[0]["CUDA_VISIBLE_DEVICES"] == "3" and not set(SECRETS) & set(given[0])


def test_slots_go_around_the_gpus() -> None:
    assert LocalExecutor().slots == 1 and LocalExecutor(slots=3).slots == 3
    assert LocalExecutor(gpus=["0", "3"]).slots == 2
    assert LocalExecutor(slots=4, gpus=["0", "3"])._free == ["0", "3", "0", "3"]
